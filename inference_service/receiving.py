"""What a worker does with a policy that comes by NCCL: into the live weights, or beside them and then over."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda import nccl
from weight_transfer.digest import combine, finish
from weight_transfer.reading import Reading
from weight_transfer.transports.nccl import ENGINE, RANKS, TRAINER
from weight_transfer.windows import Window, windows

if TYPE_CHECKING:
    from inference_service.loader import HeldWeights

#: Seconds for which nothing may come while the trainer gathers or merges its next window. Its lease ends sooner.
_PATIENCE_S = 120.0


class _Place:
    """Memory of the engine's layout that a policy is received in."""

    def __init__(self, held: HeldWeights, arenas: list[Arena], cut: list[Window]) -> None:
        self.arenas = arenas
        self.spans = [
            [(arenas[run.arena].address + run.offset, run.nbytes) for run in window.runs] for window in cut
        ]
        # A window is digested while the next one comes.
        self.readings = [Reading([held.placements[i] for i in window.tensors], arenas) for window in cut]


class Receiving:
    """Rank 1 of a trainer's communicator. Of one thread, whose current stream it uses."""

    def __init__(self, held: HeldWeights, pulse: Callable[[], None]) -> None:
        """For an engine's weights. `pulse` is called while anything is waited for, and may raise to end it."""
        self._held = held
        self._pulse = pulse
        self._windows = windows(held.placements)
        self._live: _Place | None = None
        self._stage: _Place | None = None
        self._communicator: nccl.Communicator | None = None

    def join(self, id: bytes, *, staged: bool) -> dict[str, Any]:
        """Join the communicator of that id, and have memory for what will come. Without an id the last one is kept.

        Raises:
            RuntimeError: there is none, or too little memory. NcclError: among others, the trainer did not join.
        """
        if id:
            self.leave()
            device = self._held.arenas[0].device
            self._communicator = nccl.Communicator(id, ENGINE, RANKS, device, self._pulse)
        if self._communicator is None:
            raise RuntimeError("the last update's communicator was given up")
        self._place(staged)
        return {}

    def receive(self, *, staged: bool) -> dict[str, Any]:
        """Take all windows. Returns the policy's digest, in hexadecimal."""
        communicator, place = self._communicator, self._place(staged)
        if communicator is None:
            raise RuntimeError("the last update's communicator was given up")
        events = [communicator.broadcast(spans, TRAINER, self._pulse) for spans in place.spans]
        begun = []
        for event, reading in zip(events, place.readings, strict=True):
            communicator.follow(event)
            begun.append(reading.later())
        parts = [finish(0, 0)] * len(self._held.placements)
        for window, event, digests in zip(self._windows, events, begun, strict=True):
            communicator.wait(event, _PATIENCE_S)
            for i, digest in zip(window.tensors, digests(), strict=True):
                parts[i] = digest
        return {"digest": f"{combine(parts):016x}"}

    def install(self) -> dict[str, Any]:
        """Copy what was staged over the live weights, of which nothing may be read meanwhile."""
        stage = self._stage
        if stage is None:
            raise RuntimeError("nothing was staged")
        for window in self._windows:
            for run in window.runs:
                target, source = (
                    arenas[run.arena].tensor(run.offset, (run.nbytes,), torch.uint8)
                    for arenas in (self._held.arenas, stage.arenas)
                )
                target.copy_(source)
        if (device := self._held.arenas[0].device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return {}

    def rest(self) -> None:
        """Give back what the next update can have anew in no time: the memory beside the live weights."""
        self._stage = None

    def leave(self) -> None:
        """Give up the communicator, and what was staged."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()
        self._stage = None

    def close(self) -> None:
        """Let go of everything."""
        self.leave()
        self._live = None

    def _place(self, staged: bool) -> _Place:
        if not staged:
            self._live = self._live or _Place(self._held, self._held.arenas, self._windows)
            return self._live
        if self._stage is None:
            arenas = [Arena.create("tandem-stage", a.size, a.device) for a in self._held.arenas]
            self._stage = _Place(self._held, arenas, self._windows)
        return self._stage
