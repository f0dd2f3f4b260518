"""Where the windows of an update land in a worker: straight where they belong, or in buckets, and from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda.nccl import Communicator, Span
from weight_transfer.digest import Digester, finish
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement, packed
from weight_transfer.reading import Reading
from weight_transfer.transports.nccl import TRAINER
from weight_transfer.windows import Window, in_bucket, moved, windows
from weight_transfer.write import scattering

#: Seconds for which nothing may come while the trainer gathers or merges its next window. Its lease ends sooner.
PATIENCE_S = 120.0


class Landing(ABC):
    """Takes updates of one way of cutting the policy into windows, again and again."""

    @abstractmethod
    def take(self, communicator: Communicator, pulse: Callable[[], None]) -> list[int]:
        """Receive all windows, and return when they are where they belong.

        Args:
            pulse: called while anything is waited for, and may raise to end it.

        Returns:
            The digest of each tensor, in the manifest's order, as it came.
        """


class Straight(Landing):
    """Into memory of the layout that the trainer sends. A window is digested while the next one comes."""

    def __init__(self, placements: Sequence[Placement], arenas: Sequence[Arena], window: int) -> None:
        self._count = len(placements)
        self._windows = windows(placements, window)
        self._spans = [
            [(arenas[run.arena].address + run.offset, run.nbytes) for run in cut.runs]
            for cut in self._windows
        ]
        self._readings = [Reading([placements[i] for i in cut.tensors], arenas) for cut in self._windows]

    def take(self, communicator: Communicator, pulse: Callable[[], None]) -> list[int]:
        events = [communicator.broadcast(spans, TRAINER, pulse) for spans in self._spans]
        begun = []
        for event, reading in zip(events, self._readings, strict=True):
            communicator.follow(event)
            begun.append(reading.later())
        return _noted(self._count, self._windows, events, begun, communicator)


class Scattered(Landing):
    """One worker of several: into two buckets, of which one is scattered into its arenas while the other is filled.

    What comes are whole tensors, one after the other. The worker takes those parts of them that it computes with.
    """

    def __init__(
        self, manifest: Manifest, placements: Sequence[Placement], arenas: Sequence[Arena], window: int
    ) -> None:
        """Of tensors of `manifest` this worker has parts, as its own placements say."""
        mine = {placement.spec.name: placement for placement in placements}
        whole = packed(manifest)
        self._count = len(manifest)
        self._windows = windows(whole, window)
        layouts = [in_bucket(cut.runs) for cut in self._windows]
        size = max((end for _, end in layouts), default=1)
        self._buckets = [Arena.create("tandem-bucket", max(size, 1), arenas[0].device) for _ in range(2)]
        self._spans: list[list[Span]] = []
        self._digesters: list[Digester] = []
        self._scatters: list[Callable[[], None]] = []
        for k, (cut, (starts, _)) in enumerate(zip(self._windows, layouts, strict=True)):
            bucket = self._buckets[k % 2]
            runs = zip(cut.runs, starts, strict=True)
            self._spans.append([(bucket.address + start, run.nbytes) for run, start in runs])
            tensors = {
                manifest.tensors[i].name: moved(whole[i], cut.runs, starts).view([bucket])
                for i in cut.tensors
            }
            self._digesters.append(Digester(list(tensors.values())))
            items = [(mine[name], tensor) for name, tensor in tensors.items() if name in mine]
            self._scatters.append(scattering(items, arenas))

    def take(self, communicator: Communicator, pulse: Callable[[], None]) -> list[int]:
        events, begun = [], []
        emptied: list[torch.cuda.Event | None] = [None, None]
        for k, spans in enumerate(self._spans):
            event = communicator.broadcast(spans, TRAINER, pulse, emptied[k % 2])
            communicator.follow(event)
            begun.append(self._digesters[k].later())
            self._scatters[k]()
            emptied[k % 2] = communicator.mark()
            events.append(event)
        found = _noted(self._count, self._windows, events, begun, communicator)
        for last in emptied:
            if last is not None:
                communicator.wait(last)
        return found


def _noted(
    count: int,
    cuts: Sequence[Window],
    events: Sequence[torch.cuda.Event],
    begun: Sequence[Callable[[], list[int]]],
    communicator: Communicator,
) -> list[int]:
    """The digests of all tensors, once all windows are there. One of no elements is in none."""
    parts = [finish(0, 0)] * count
    for event in events:  # all first: some digests are put behind the last window, and waited for
        communicator.wait(event, PATIENCE_S)
    for cut, digests in zip(cuts, begun, strict=True):
        for i, digest in zip(cut.tensors, digests(), strict=True):
            parts[i] = digest
    return parts
