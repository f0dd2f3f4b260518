"""A mirror that sends what changed since the last commit, and a window of which too much changed as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda.nccl import Communicator, Span
from weight_transfer.cuda.several import Several
from weight_transfer.digest import finished
from weight_transfer.messages import MessageMemory, unsigned
from weight_transfer.patches import Find, find
from weight_transfer.tiles import BREAK_EVEN, ENTRY, HEADER, finer, tilings
from weight_transfer.transports.base import SourceTensor
from weight_transfer.transports.outgoing import TRAINER, Layout, Mirror, nothing_travels, spans_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Search:
    """The changes of an update, looked for and put on their way.

    rooms, counts: for how many changes each window's message has room, and how many it has; int64, in device memory.
    sums: the tensors' digest sums. sent: reached when each message is there. done: when all was looked at, which the
    first `awaited` of those come before.
    """

    rooms: list[int]
    told: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    sent: list[torch.cuda.Event]
    awaited: int
    done: torch.cuda.Event
    nbytes: int


class SparseMirror(Mirror):
    """Keeps beside the mirror a base, as large: what the engine has committed. For one engine.

    A pass over a window compares, renews the base and digests. So after an update that failed the base is not what the
    engine has, and the next update is whole: nothing that changed is lost.
    """

    def __init__(self, layout: Layout, break_even: float = BREAK_EVEN) -> None:
        """As `Mirror`. Raises ValueError for a policy of which changes cannot be told."""
        self._break_even = break_even
        self._finer = finer(layout.cut, layout.placements)
        self._tilings = tilings(self._finer, layout.placements)
        super().__init__(layout)
        self._device = layout.device
        self._sizes = np.array([spec.nbytes for spec in layout.manifest], np.uint64)
        self._last: list[int | None] = [None] * len(self._finer)  # units that changed, of each window
        self._base: list[Arena] = []
        self._finds: list[Find] = []
        self._memory_of_messages = MessageMemory(layout.device)
        self._search: _Search | None = None  # of the update that is under way
        self._follow: Callable[[torch.cuda.Event], None] = lambda event: None
        self._refused = False  # there is no memory for a base
        self._renewed = self._committed = False  # the base is what was sent last; and the engine has that

    @property
    def partial(self) -> bool:
        return self._committed

    def mark(self) -> None:
        self._committed = self._renewed

    def forget(self) -> None:
        super().forget()
        self._settle()
        self._committed = False

    def start(self, communicator: Communicator | Several, alive: Callable[[], None]) -> None:
        if not self._committed:
            super().start(communicator, alive)
            return
        self._committed = self._renewed = False  # whatever becomes of the update: the base is renewed now
        self._look(cast(Communicator, communicator), alive)

    def send(
        self,
        policy: Mapping[int, SourceTensor],
        communicator: Communicator | Several,
        alive: Callable[[], None],
        told: Callable[[list[int]], None] = lambda digests: None,
    ) -> list[int]:
        if not self._committed and self._search is None:
            self._renewed, self.changed = False, None
            self.nbytes = sum(window.nbytes for window in self._windows)
            parts = super().send(policy, communicator, alive, told)
            self._renewed = self._renew()
            return parts
        if policy:
            self._memory.move(list(policy.values()), nothing_travels)
        if self._search is None:
            self.start(communicator, alive)
        search = self._search
        assert search is not None  # noqa: S101  for the type checker
        try:
            parts = self._see_through(search, cast(Communicator, communicator), alive, told)
        finally:
            self._settle()
        self._renewed = True
        return parts

    def close(self) -> None:
        self._settle()
        super().close()
        self._finds.clear()
        self._base.clear()
        self._memory_of_messages.drop()
        self._renewed = self._committed = False

    def _renew(self) -> bool:
        """Have the base be the mirror, in the order of the current stream. Whether there is one."""
        if self._refused:
            return False
        try:
            for arena in self._arenas[len(self._base) :]:
                self._base.append(Arena.create("tandem-base", arena.size, arena.device))
        except (RuntimeError, OSError) as error:
            self._refused = True
            self._base.clear()
            logger.warning("updates stay whole: no memory for what the engine has committed: %s", error)
            return False
        fresh = not self._finds
        if fresh:
            self._finds = [find(tiling, self._arenas, self._base) for tiling in self._tilings]
        for base, now in zip(self._base, self._arenas, strict=True):
            whole = (base.tensor(0, (now.size,), torch.uint8), now.tensor(0, (now.size,), torch.uint8))
            whole[0].copy_(whole[1])
        if fresh:
            self._load()
        return True

    def _load(self) -> None:
        """Have the kernels compiled and loaded: that may wait for all that the device does, and so for the engine."""
        if not self._tilings:
            return
        k = min(range(len(self._tilings)), key=lambda k: self._tilings[k].tiles)
        message = torch.zeros(self._tilings[k].words(0), dtype=torch.int32, device=self._device)
        room = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._finds[k](
            room, torch.zeros(len(self._manifest), dtype=torch.int64, device=self._device), message
        )
        unsigned(message[:1]).tolist()

    def _look(self, communicator: Communicator, alive: Callable[[], None]) -> None:
        """Look for changes, and send them. Nothing waits for the host: a message has the room that was told first."""
        rooms = [
            tiling.room(last, self._break_even)
            for tiling, last in zip(self._tilings, self._last, strict=True)
        ]
        words = [tiling.words(room) for tiling, room in zip(self._tilings, rooms, strict=True)]
        messages = self._memory_of_messages.of(words)
        told = torch.tensor(rooms, dtype=torch.int64).to(self._device)
        counts = torch.zeros_like(told)
        sums = torch.zeros(len(self._manifest), dtype=torch.int64, device=self._device)
        messages.clear()
        written = communicator.mark()
        with communicator.beside():
            communicator.follow(written)
            sent = [communicator.broadcast([span_of(told)], TRAINER, alive, written)]
            try:
                for k, (search, message) in enumerate(zip(self._finds, messages.each, strict=True)):
                    if k >= messages.slots:
                        communicator.follow(sent[1 + k - messages.slots])
                        message[:HEADER].zero_()
                    search(told[k:], sums, message)
                    if not messages.apart:
                        counts[k : k + 1] = unsigned(message[:1])
                    found = communicator.mark()
                    sent.append(communicator.broadcast([span_of(message)], TRAINER, alive, found))
                if messages.apart:
                    counts = messages.counts()
            finally:
                nbytes = told.nbytes + ENTRY * sum(words)
                self._follow = communicator.follow
                awaited = max(0, len(sent) - messages.slots)
                self._search = _Search(rooms, told, counts, sums, sent, awaited, communicator.mark(), nbytes)

    def _see_through(
        self,
        search: _Search,
        communicator: Communicator,
        alive: Callable[[], None],
        told: Callable[[list[int]], None],
    ) -> list[int]:
        with communicator.beside():
            for event in search.sent[
                : search.awaited
            ]:  # one by one: a slow wire is not one that stands still
                communicator.wait(event)
            communicator.wait(search.done)
            counts = search.counts.tolist()
            whole = [k for k, (n, room) in enumerate(zip(counts, search.rooms, strict=True)) if n > room]
            addresses = [arena.address for arena in self._arenas]
            for k in whole:
                spans = spans_of(self._finer[k].runs, addresses)
                search.sent.append(communicator.broadcast(spans, TRAINER, alive))
            parts = finished(search.sums.cpu().numpy(), self._sizes)
        told(parts)
        for event in search.sent:
            communicator.wait(event)
        self._last, self.changed = list(counts), sum(counts)
        self.nbytes = search.nbytes + sum(self._finer[k].nbytes for k in whole)
        return parts

    def _settle(self) -> None:
        """Have the current stream, of which the memory is, and who writes parameters and base, wait for the search."""
        search, self._search = self._search, None
        if search is not None:
            self._follow(search.done)


def span_of(tensor: torch.Tensor) -> Span:
    """A contiguous tensor's bytes, to be broadcast."""
    return (tensor.data_ptr(), tensor.nbytes)
