"""Where a policy stands in the engine's layout while it is sent: in a mirror of the arenas, or a window at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda.nccl import Communicator, Span
from weight_transfer.cuda.several import Several
from weight_transfer.digest import finish
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement
from weight_transfer.reading import Reading
from weight_transfer.transports.base import SourceTensor
from weight_transfer.transports.shared import SharedTransport
from weight_transfer.windows import MIRROR_BYTES, WINDOW_BYTES, Run, Window, in_bucket, moved
from weight_transfer.write import write

TRAINER = 0  # the rank whose bytes travel


@dataclass(frozen=True)
class Layout:
    """How an engine takes a policy.

    placements: where each tensor lies, in the manifest's order. sizes: bytes of the arenas. cut: in which windows.
    """

    manifest: Manifest
    placements: tuple[Placement, ...]
    sizes: tuple[int, ...]
    cut: tuple[Window, ...]
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(window.nbytes for window in self.cut)


class Outgoing(ABC):
    """The trainer's memory that is sent, on one GPU.

    nbytes, changed: of the last `send`, as in `Moved`.
    """

    changed: int | None = None

    def __init__(self, layout: Layout) -> None:
        """For a policy that lies as `layout` says."""
        self._manifest = layout.manifest
        self._windows = layout.cut
        self.nbytes = layout.nbytes

    def stands(self) -> bool:
        """Whether every tensor is in this memory by itself, so that `send` needs none of them."""
        return False

    @property
    def partial(self) -> bool:
        """Whether the next `send` brings what changed since `mark` alone."""
        return False

    def mark(self) -> None:
        """What was sent last is committed."""
        return

    def start(self, communicator: Communicator | Several, alive: Callable[[], None]) -> None:
        """Begin to send what `stands` here, before the other side may take it: `send` goes on with that."""
        return

    @abstractmethod
    def send(
        self,
        policy: Mapping[int, SourceTensor],
        communicator: Communicator | Several,
        alive: Callable[[], None],
        told: Callable[[list[int]], None] = lambda digests: None,
    ) -> list[int]:
        """Send all windows, and return when they are there.

        Args:
            policy: each tensor, by its index in the manifest; none where all are in this memory.
            alive: raises once the update has ended.
            told: is given what will be returned, if that is known while windows are on their way.

        Returns:
            The digest of each tensor, in the manifest's order.
        """

    def forget(self) -> None:
        """What was started goes nowhere: its communicator is no more. The next `send` brings everything."""
        return

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Parameters in it get their own, with the same values."""


class Mirror(Outgoing):
    """The whole policy, laid out as the engine has it. Parameters of its dtypes become views of it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        arenas = self._arenas = [Arena.create("tandem-mirror", size, layout.device) for size in layout.sizes]
        self._spans = [spans_of(window.runs, [arena.address for arena in arenas]) for window in layout.cut]
        self._memory = SharedTransport(layout.manifest, layout.placements, arenas)
        self._reading = Reading(layout.placements, arenas)
        self._sent: tuple[list[Any], Callable[[], list[int]], torch.cuda.Event] | None = None

    def start(self, communicator: Communicator | Several, alive: Callable[[], None]) -> None:
        written = communicator.mark()
        events = [communicator.broadcast(spans, TRAINER, alive, written) for spans in self._spans]
        with communicator.beside():
            communicator.follow(written)
            self._sent = events, self._reading.later(), written

    def send(
        self,
        policy: Mapping[int, SourceTensor],
        communicator: Communicator | Several,
        alive: Callable[[], None],
        told: Callable[[list[int]], None] = lambda digests: None,
    ) -> list[int]:
        if policy:
            self._memory.move(list(policy.values()), nothing_travels)
        if self._sent is None:
            self.start(communicator, alive)
        sent, self._sent = self._sent, None
        assert sent is not None  # noqa: S101  for the type checker
        events, found, written = sent
        with communicator.beside():
            communicator.follow(written)
            digests = found()  # long before the last window is there
        told(digests)
        for event in events:
            communicator.wait(event)
        return digests

    def forget(self) -> None:
        self._sent = None

    def stands(self) -> bool:
        return self._memory.stands()

    def close(self) -> None:
        self._memory.close()
        self._arenas.clear()


class Buckets(Outgoing):
    """Two buckets, each with room for a window: one is filled while the other is on its way."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        layouts = [in_bucket(window.runs) for window in layout.cut]
        size = max((end for _, end in layouts), default=1)
        self._buckets = [Arena.create("tandem-bucket", max(size, 1), layout.device) for _ in range(2)]
        self._spans: list[list[Span]] = []
        self._places: list[list[tuple[int, Placement]]] = []
        for k, (window, (starts, _)) in enumerate(zip(layout.cut, layouts, strict=True)):
            bucket = self._buckets[k % 2].address
            runs = zip(window.runs, starts, strict=True)
            self._spans.append([(bucket + start, run.nbytes) for run, start in runs])
            self._places.append(
                [(i, moved(layout.placements[i], window.runs, starts)) for i in window.tensors]
            )

    def send(
        self,
        policy: Mapping[int, SourceTensor],
        communicator: Communicator | Several,
        alive: Callable[[], None],
        told: Callable[[list[int]], None] = lambda digests: None,
    ) -> list[int]:
        parts = [finish(0, 0)] * len(self._manifest)
        events: list[Any] = []
        order = {i: k for k, i in enumerate(policy)}  # pieces of one parameter follow each other in it
        for k, (spans, unordered) in enumerate(zip(self._spans, self._places, strict=True)):
            if k >= 2:
                communicator.wait(events[k - 2])
            places = sorted(unordered, key=lambda place: order[place[0]])
            items = [(place, policy[i].read().detach()) for i, place in places]
            for (i, _), digest in zip(places, write(items, [self._buckets[k % 2]]), strict=True):
                parts[i] = digest
            del items  # no more fresh memory is held than a window's
            events.append(communicator.broadcast(spans, TRAINER, alive, communicator.mark()))
        told(parts)
        for event in events[-2:]:
            communicator.wait(event)
        return parts

    def close(self) -> None:
        self._buckets.clear()


def mirrored(manifest: Manifest, policy: Sequence[SourceTensor]) -> bool:
    """Whether a policy shall stand in a mirror.

    One costs nothing where parameters become it, and their size in the engine's dtype where they don't.
    """
    dtypes = {spec.name: spec.dtype for spec in manifest}
    mine = sum(
        s.spec.nbytes for s in policy if s.parameter is not None and s.spec.dtype == dtypes.get(s.name)
    )
    return 2 * mine >= manifest.nbytes


def window_wanted(manifest: Manifest, policy: Sequence[SourceTensor]) -> int:
    """Bytes of a window: many, but for buckets, of which each takes as much memory."""
    return MIRROR_BYTES if mirrored(manifest, policy) else WINDOW_BYTES


def nothing_travels(piece: object) -> None:
    """What the mirror's own move has for `send`."""
    raise AssertionError(f"a mirror sends no {type(piece).__name__}")


def spans_of(runs: Sequence[Run], addresses: Sequence[int]) -> list[Span]:
    return [(addresses[run.arena] + run.offset, run.nbytes) for run in runs]
