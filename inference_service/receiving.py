"""What a worker does with a policy that comes by NCCL: into the live weights, or beside them and then over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from inference_service.landing import Landing, Scattered, Straight
from inference_service.receiving_changes import Changes
from weight_transfer.arena import Arena
from weight_transfer.cuda import nccl
from weight_transfer.digest import combine
from weight_transfer.manifest import Manifest
from weight_transfer.windows import Window, windows

if TYPE_CHECKING:
    from inference_service.loader import HeldWeights

T = TypeVar("T")


@dataclass(frozen=True)
class Crew:
    """The workers of an engine, and which one this is.

    rank: this worker's in a trainer's communicator. ranks: all of them, the trainer's among them. manifest: of what
    comes, where each worker has parts of that alone.
    """

    rank: int = 1
    ranks: int = 2
    manifest: Manifest | None = None


class Receiving:
    """A worker's rank of a trainer's communicator. Of one thread, whose current stream it uses."""

    def __init__(self, held: HeldWeights, pulse: Callable[[], None], crew: Crew) -> None:
        """For a worker's weights. `pulse` is called while anything is waited for, and may raise to end it."""
        self._held = held
        self._pulse = pulse
        self._crew = crew
        self._live: tuple[int, Landing] | None = None  # by bytes of a window
        self._beside: tuple[int, Landing] | None = None
        self._stage: list[Arena] = []
        self._over: list[Window] = []  # all of the stage
        self._changes: tuple[int, Changes] | None = None
        self._communicator: nccl.Communicator | None = None
        self._prepared = False  # all is beside the live weights, and waits for `install` or `drop`

    def join(self, id: bytes, *, staged: bool, window: int) -> dict[str, Any]:
        """Join the communicator of that id, and have memory for what will come. Without an id the last one is kept.

        Raises:
            RuntimeError: there is none, or too little memory. NcclError: among others, somebody did not join.
        """
        if id:
            self.leave()
            device = self._held.arenas[0].device
            self._communicator = nccl.Communicator(id, self._crew.rank, self._crew.ranks, device, self._pulse)
        if self._communicator is None:
            raise RuntimeError("the last update's communicator was given up")
        self._landing(staged, window)
        return {}

    def receive(self, *, staged: bool, window: int) -> dict[str, Any]:
        """Take all windows. Returns the policy's digest, in hexadecimal."""
        self._drop_changes()
        communicator, landing = self._communicator, self._landing(staged, window)
        if communicator is None:
            raise RuntimeError("the last update's communicator was given up")
        digest = combine(landing.take(communicator, self._pulse))
        self._prepared = staged
        return {"digest": f"{digest:016x}"}

    def changes(self, *, staged: bool, window: int) -> dict[str, Any]:
        """Take what changed since the live weights' version. Returns the policy's digest, in hexadecimal.

        Raises:
            ValueError: changes cannot be told of this worker's weights.
        """
        if self._communicator is None:
            raise RuntimeError("the last update's communicator was given up")
        if self._crew.manifest is not None:
            raise ValueError("changes are for engines of one worker")
        if self._changes is None or self._changes[0] != window:
            self._changes = window, self._pulsed(lambda: Changes(self._held, window))
        if staged:  # the messages are the stage: both at once may be more than there is
            self._drop_stage()
        arenas = self._beside_live if staged else lambda: self._held.arenas
        parts = self._changes[1].receive(self._communicator, self._pulse, arenas, staged=staged)
        self._prepared = staged
        return {"digest": f"{combine(parts):016x}"}

    def install(self) -> dict[str, Any]:
        """Have what was staged be the live weights, of which nothing may be read meanwhile."""
        if self._changes is not None and self._changes[1].keeps:
            copied = self._changes[1].install()
        elif self._stage:
            copied = self._over
        else:
            raise RuntimeError("nothing was staged")
        for cut in copied:
            for run in cut.runs:
                target, source = (
                    arenas[run.arena].tensor(run.offset, (run.nbytes,), torch.uint8)
                    for arenas in (self._held.arenas, self._stage)
                )
                target.copy_(source)
        if (device := self._held.arenas[0].device).type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._prepared = False
        return {}

    def drop(self) -> None:
        """What was staged will not be installed."""
        self._prepared = False

    def rest(self) -> None:
        """Give back what the next update can have anew in no time: the memory beside the live weights. But not while
        what is there shall be installed, however long that takes: replicas wait for one another.
        """
        if self._prepared:
            return
        self._drop_stage()
        self._drop_changes()
        if self._crew.manifest is not None:  # of which buckets are a part
            self._live = None

    def leave(self) -> None:
        """Give up the communicator, and the memory beside the live weights."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()
        self.drop()
        self.rest()

    def close(self) -> None:
        """Let go of everything."""
        self.leave()
        self._live = self._changes = None

    def _pulsed(self, make: Callable[[], T]) -> T:
        """What takes its time, as compiling kernels does, in a thread, with signs of life meanwhile."""

        def made() -> T:
            device = self._held.arenas[0].device
            with nccl.own_stream(device):
                found = make()
                if device.type == "cuda":  # who asked has another stream
                    torch.cuda.current_stream(device).synchronize()
                return found

        with ThreadPoolExecutor(1) as thread:
            making = thread.submit(made)
            while not making.done():
                self._pulse()
                wait([making], timeout=0.1)
            return making.result()

    def _drop_changes(self) -> None:
        if self._changes is not None:
            self._changes[1].drop()

    def _drop_stage(self) -> None:
        self._stage, self._beside = [], None

    def _beside_live(self) -> Sequence[Arena]:
        if not self._stage:
            # Now, since generation is stopped in `install`. For thousands of tensors it takes milliseconds.
            self._over = windows(self._held.placements, 1 << 62)
            self._stage = [Arena.create("tandem-stage", a.size, a.device) for a in self._held.arenas]
        return self._stage

    def _landing(self, staged: bool, window: int) -> Landing:
        if staged and not self._stage:
            self._pulsed(self._beside_live)
        kept = self._beside if staged else self._live
        if kept is None or kept[0] != window:
            arenas = self._stage if staged else self._held.arenas
            kept = window, self._pulsed(lambda: self._made(arenas, window))
        if staged:
            self._beside = kept
        else:
            self._live = kept
        return kept[1]

    def _made(self, arenas: Sequence[Arena], window: int) -> Landing:
        if self._crew.manifest is None:
            return Straight(self._held.placements, arenas, window)
        return Scattered(self._crew.manifest, self._held.placements, arenas, window)
