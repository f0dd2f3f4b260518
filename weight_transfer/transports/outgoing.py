"""Where a policy stands in the engine's layout while it is sent: in a mirror of the arenas, or a window at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from weight_transfer.arena import ALIGNMENT, Arena, align
from weight_transfer.cuda.nccl import Communicator, Span
from weight_transfer.digest import finish
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement
from weight_transfer.reading import Reading
from weight_transfer.transports.base import SourceTensor
from weight_transfer.transports.shared import SharedTransport
from weight_transfer.windows import Run, Window
from weight_transfer.write import write

_TRAINER = 0  # the rank whose bytes travel


class Outgoing(ABC):
    """The trainer's memory that is sent, on one GPU."""

    def __init__(
        self,
        manifest: Manifest,
        placements: Sequence[Placement],
        windows: Sequence[Window],
        arena_sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        """For tensors that lie in arenas of these sizes as `placements` says, in the manifest's order."""
        self._manifest = manifest
        self._placements = list(placements)
        self._windows = list(windows)

    def stands(self) -> bool:
        """Whether every tensor is in this memory by itself, so that `send` needs none of them."""
        return False

    @abstractmethod
    def send(
        self, policy: Mapping[int, SourceTensor], communicator: Communicator, alive: Callable[[], None]
    ) -> list[int]:
        """Send all windows, and return when they are there.

        Args:
            policy: each tensor, by its index in the manifest; none where all are in this memory.
            alive: raises once the update has ended.

        Returns:
            The digest of each tensor, in the manifest's order.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. Parameters in it get their own, with the same values."""


class Mirror(Outgoing):
    """The whole policy, laid out as the engine has it. Parameters of its dtypes become views of it."""

    def __init__(
        self,
        manifest: Manifest,
        placements: Sequence[Placement],
        windows: Sequence[Window],
        arena_sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(manifest, placements, windows, arena_sizes, device)
        arenas = [Arena.create("tandem-mirror", size, device) for size in arena_sizes]
        self._spans = [_spans(window.runs, [arena.address for arena in arenas]) for window in windows]
        self._memory = SharedTransport(manifest, placements, arenas)
        self._reading = Reading(placements, arenas)

    def send(
        self, policy: Mapping[int, SourceTensor], communicator: Communicator, alive: Callable[[], None]
    ) -> list[int]:
        if policy:
            self._memory.move(list(policy.values()), _nothing_travels)
        written = communicator.mark()
        events = [communicator.broadcast(spans, _TRAINER, alive, written) for spans in self._spans]
        with communicator.beside():
            communicator.follow(written)
            found = self._reading.later()
            for event in events:
                communicator.wait(event)
            return found()

    def stands(self) -> bool:
        return self._memory.stands()

    def close(self) -> None:
        self._memory.close()


class Buckets(Outgoing):
    """Two buckets, each with room for a window: one is filled while the other is on its way."""

    def __init__(
        self,
        manifest: Manifest,
        placements: Sequence[Placement],
        windows: Sequence[Window],
        arena_sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        super().__init__(manifest, placements, windows, arena_sizes, device)
        layouts = [_packed(window.runs) for window in windows]
        size = max((end for _, end in layouts), default=1)
        self._buckets = [Arena.create("tandem-bucket", max(size, 1), device) for _ in range(2)]
        self._spans: list[list[Span]] = []
        self._places: list[list[tuple[int, Placement]]] = []
        for k, (window, (starts, _)) in enumerate(zip(windows, layouts, strict=True)):
            bucket = self._buckets[k % 2].address
            runs = zip(window.runs, starts, strict=True)
            self._spans.append([(bucket + start, run.nbytes) for run, start in runs])
            self._places.append([(i, _moved(placements[i], window.runs, starts)) for i in window.tensors])

    def send(
        self, policy: Mapping[int, SourceTensor], communicator: Communicator, alive: Callable[[], None]
    ) -> list[int]:
        parts = [finish(0, 0)] * len(self._manifest)
        events: list[torch.cuda.Event] = []
        for k, (spans, places) in enumerate(zip(self._spans, self._places, strict=True)):
            if k >= 2:
                communicator.wait(events[k - 2])
            items = [(place, policy[i].read().detach()) for i, place in places]
            for (i, _), digest in zip(places, write(items, [self._buckets[k % 2]]), strict=True):
                parts[i] = digest
            events.append(communicator.broadcast(spans, _TRAINER, alive, communicator.mark()))
        for event in events[-2:]:
            communicator.wait(event)
        return parts

    def close(self) -> None:
        self._buckets.clear()


def _nothing_travels(piece: object) -> None:
    raise AssertionError(f"a mirror sends no {type(piece).__name__}")


def _spans(runs: Sequence[Run], addresses: Sequence[int]) -> list[Span]:
    return [(addresses[run.arena] + run.offset, run.nbytes) for run in runs]


def _packed(runs: Sequence[Run]) -> tuple[list[int], int]:
    """Where each run begins in a bucket, aligned as it is in its arena; and where the last ends."""
    starts, end = [], 0
    for run in runs:
        starts.append(align(end) + run.offset % ALIGNMENT)
        end = starts[-1] + run.nbytes
    return starts, end


def _moved(placement: Placement, runs: Sequence[Run], starts: Sequence[int]) -> Placement:
    """The placement in a bucket."""
    blocks = []
    for block in placement.blocks:
        if not block.numel:
            continue
        (at,) = (
            start + block.arena_offset - run.offset
            for run, start in zip(runs, starts, strict=True)
            if run.arena == block.arena and run.offset <= block.arena_offset < run.offset + run.nbytes
        )
        blocks.append(replace(block, arena=0, arena_offset=at))
    return replace(placement, blocks=tuple(blocks))
