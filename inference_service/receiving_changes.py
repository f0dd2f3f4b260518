"""What a worker does with changes that come by NCCL: placed in the live weights, or kept beside them until the commit.

Either way every byte of the policy is read and digested as it then is, window after window while the next one comes. An
older sum, corrected where something changed, would be quicker and would not tell that other bytes are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from inference_service.landing import PATIENCE_S
from weight_transfer.arena import Arena
from weight_transfer.cuda.nccl import Communicator
from weight_transfer.digest import finished
from weight_transfer.messages import MessageMemory, unsigned
from weight_transfer.patches import patch
from weight_transfer.reading import Reading
from weight_transfer.tiles import finer, tilings
from weight_transfer.transports.nccl import TRAINER
from weight_transfer.transports.nccl_sparse import span_of
from weight_transfer.transports.outgoing import spans_of
from weight_transfer.windows import Window, windows

if TYPE_CHECKING:
    from inference_service.loader import HeldWeights


@dataclass(frozen=True)
class _Kept:
    """A staged update: each window's message, the rooms in them, and which windows came whole."""

    messages: Sequence[torch.Tensor]
    rooms: torch.Tensor
    whole: list[int]


class Changes:
    """Of updates whose windows are cut alike. Of one thread, whose current stream it uses."""

    def __init__(self, held: HeldWeights, window: int) -> None:
        """For the weights of an engine of one worker, and a trainer's windows of so many bytes.

        Raises:
            ValueError: changes cannot be told of these weights.
        """
        self._placements = list(held.placements)
        self._windows = finer(windows(self._placements, window), self._placements)
        self._tilings = tilings(self._windows, self._placements)
        self._patches = [patch(tiling, held.arenas) for tiling in self._tilings]
        self._sizes = np.array([placement.spec.nbytes for placement in self._placements], np.uint64)
        self._device = held.arenas[0].device
        self._kept: _Kept | None = None
        self._load()

    def _load(self) -> None:
        """Have the kernels compiled and loaded: that may wait for all that the device does, and so for a trainer."""
        if not self._tilings:
            return
        k = min(range(len(self._tilings)), key=lambda k: self._tilings[k].tiles)
        nothing = torch.zeros(self._tilings[k].words(0), dtype=torch.int32, device=self._device)
        room = torch.zeros(1, dtype=torch.int64, device=self._device)
        sums = torch.zeros(len(self._placements), dtype=torch.int64, device=self._device)
        for wanted, write in ((sums, False), (sums, True), (None, True)):
            self._patches[k](room, wanted, nothing, write=write)
        unsigned(nothing[:1]).tolist()

    def receive(
        self,
        communicator: Communicator,
        pulse: Callable[[], None],
        place: Callable[[], Sequence[Arena]],
        *,
        staged: bool,
    ) -> list[int]:
        """Take the changes of all windows. Returns the digest of each tensor as the update makes it.

        Args:
            communicator: the trainer's and ours.
            pulse: called while anything is waited for, and may raise to end it.
            place: where windows come that travel whole: the live weights, or memory beside them.
            staged: whether the live weights stay as they are until `install`.

        Raises:
            RuntimeError: what came is no trainer's.
        """
        self.drop()
        device, n = self._device, len(self._windows)
        rooms = torch.zeros(n, dtype=torch.int64, device=device)
        first = communicator.broadcast([span_of(rooms)], TRAINER, pulse, communicator.mark())
        communicator.wait(first, PATIENCE_S)
        told = rooms.tolist()
        if any(not 0 <= room <= tiling.most for room, tiling in zip(told, self._tilings, strict=True)):
            raise RuntimeError("the trainer cuts the policy in another way")
        words = [tiling.words(room) for tiling, room in zip(self._tilings, told, strict=True)]
        messages = MessageMemory(device).of(words, kept=staged)
        sums = torch.zeros(len(self._placements), dtype=torch.int64, device=device)
        found = torch.zeros(n, dtype=torch.int64, device=device)
        began, came = communicator.mark(), []
        free: list[torch.cuda.Event] = []
        for k, (place_changes, message) in enumerate(zip(self._patches, messages.each, strict=True)):
            before = began if k < messages.slots else free[k - messages.slots]
            came.append(communicator.broadcast([span_of(message)], TRAINER, pulse, before))
            communicator.follow(came[-1])
            place_changes(rooms[k:], sums, message, write=not staged)
            if not messages.apart:
                found[k : k + 1] = unsigned(message[:1])
                free.append(communicator.mark())
        if messages.apart:
            found = messages.counts()
        for event in came:
            communicator.wait(event, PATIENCE_S)
        whole = [k for k, (count, room) in enumerate(zip(found.tolist(), told, strict=True)) if count > room]
        parts = finished(sums.cpu().numpy(), self._sizes)
        if whole:
            self._receive_whole(whole, parts, communicator, pulse, place())
        if staged:
            self._kept = _Kept(messages.each, rooms, whole)
        return parts

    def install(self) -> list[Window]:
        """Place what is kept, and let go of it. Returns the windows that came whole, to be copied from beside.

        Raises:
            RuntimeError: nothing is.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError("nothing was staged")
        for k, (place_changes, message) in enumerate(zip(self._patches, kept.messages, strict=True)):
            place_changes(kept.rooms[k:], None, message, write=True)
        return [self._windows[k] for k in kept.whole]

    @property
    def keeps(self) -> bool:
        """Whether there is something to `install`."""
        return self._kept is not None

    def drop(self) -> None:
        """Let go of what is kept."""
        self._kept = None

    def _receive_whole(
        self,
        whole: Sequence[int],
        parts: list[int],
        communicator: Communicator,
        pulse: Callable[[], None],
        arenas: Sequence[Arena],
    ) -> None:
        # First of all: what says where they lie is copied in the order of the current stream, and waited for.
        readings = [Reading([self._placements[i] for i in self._windows[k].tensors], arenas) for k in whole]
        begun = []
        for k, reading in zip(whole, readings, strict=True):
            window = self._windows[k]
            spans = spans_of(window.runs, [arena.address for arena in arenas])
            event = communicator.broadcast(spans, TRAINER, pulse)
            communicator.follow(event)
            begun.append((window, event, reading.later()))
        for _, event, _ in begun:  # some digests are put behind the last window, and waited for
            communicator.wait(event, PATIENCE_S)
        for window, _, digests in begun:
            for i, digest in zip(window.tensors, digests(), strict=True):
                parts[i] = digest
