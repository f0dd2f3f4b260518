"""One trainer's session, as the service has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from inference_service.staging import MappedStaging
from inference_service.trained import TrainedAdapter
from weight_transfer.manifest import TensorSpec


@dataclass(eq=False)
class Session:
    """A trainer's. A shared one lives as long as its processes and their connections to the descriptor socket."""

    id: str
    transport: str
    reason: str  # why not a faster transport
    tensors: tuple[TensorSpec, ...]
    mode: str = ""  # of its updates: staged, in_place, or as each begin chooses
    stage: MappedStaging | None = None  # what the trainer maps, where it is not the engine's memory
    adapter: TrainedAdapter | None = None  # what its updates carry, if not the policy
    window_bytes: int = 0  # of what comes by NCCL
    token: bytes = b""
    aliased: bool = False  # every parameter of the trainer may be the engine's memory
    committed: bool = False  # it has committed an update: what can be aliased is
    ranks: int = 1  # processes of the trainer that write together: each fetches the descriptors
    joined: int = 0  # of them, those that have
    here: int = 0  # and those that are still there
    over: bool = False
    _watchers: list[Callable[[str], None]] = field(default_factory=list)

    @property
    def attached(self) -> bool:
        """The trainer has fetched the descriptors."""
        return self.joined == self.ranks

    @property
    def alive(self) -> bool:
        """Whether somebody may still write for it."""
        return not self.over or self.here > 0

    @contextlib.contextmanager
    def watched(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Have `tell` called with the reason if the session ends meanwhile."""
        self._watchers.append(tell)
        try:
            yield
        finally:
            self._watchers.remove(tell)

    def broke_off(self, reason: str) -> None:
        """Its update cannot go on, whatever the trainer does."""
        for tell in list(self._watchers):
            tell(reason)

    def end(self, reason: str) -> None:
        """It is over: those that are still there may write no more."""
        self.over = True
        stage, self.stage = self.stage, None
        if stage is not None:
            stage.close()
        for tell in list(self._watchers):
            tell(reason)
