"""Several communicators with one engine each, as one: what is broadcast travels to all of them at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from weight_transfer.cuda.nccl import STALL_S, Communicator, Span


@dataclass(eq=False)
class End:
    """One engine's communicator.

    alive: raises once nothing can be brought there any more. broke: is told what went wrong with it, which may be
    everybody's failure: then it raises.
    """

    communicator: Communicator
    alive: Callable[[], None]
    broke: Callable[[Exception], None]


Events = dict[End, torch.cuda.Event]


class Several:
    """Goes on with those that are there, as long as it is told to. Has the methods of `Communicator` that send."""

    def __init__(self, ends: Sequence[End]) -> None:
        """For at least one, all of one device's."""
        self._ends = list(ends)
        self._one = ends[0].communicator

    def broadcast(
        self,
        spans: Sequence[Span],
        root: int,
        check: Callable[[], None],
        after: torch.cuda.Event | None = None,
    ) -> Events:
        """As `Communicator.broadcast`, to all."""
        events: Events = {}
        for end in list(self._ends):
            try:
                events[end] = end.communicator.broadcast(spans, root, end.alive, after)
            except Exception as error:  # noqa: BLE001  # whose failure it is, is not known here
                self._without(end, error)
        return events

    def wait(self, event: Events, seconds: float = STALL_S) -> None:
        """As `Communicator.wait`, for all."""
        for end, reached in event.items():
            if end in self._ends:
                try:
                    end.communicator.wait(reached, seconds)
                except Exception as error:  # noqa: BLE001
                    self._without(end, error)

    def mark(self) -> torch.cuda.Event:
        """As `Communicator.mark`."""
        return self._one.mark()

    def follow(self, event: torch.cuda.Event) -> None:
        """As `Communicator.follow`."""
        self._one.follow(event)

    def beside(self) -> AbstractContextManager[None]:
        """As `Communicator.beside`."""
        return self._one.beside()

    def _without(self, end: End, error: Exception) -> None:
        self._ends.remove(end)
        end.broke(error)
