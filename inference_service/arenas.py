"""The engine's arenas as the service has them: handed on to trainers, digested, and written from what was staged."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from inference_service.staging import Staging
from tandem.errors import DataLoss, Reason
from weight_transfer.arena import Arena
from weight_transfer.digest import combine
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement
from weight_transfer.reading import Reading
from weight_transfer.windows import WINDOW_BYTES
from weight_transfer.write import copy


@dataclass(frozen=True)
class Handle:
    """One arena as another process gets it.

    size: bytes. gpu: UUID of the GPU that it is on, "" for host memory. rank: of the worker that computes with it.
    """

    fd: int
    size: int
    gpu: str = ""
    rank: int = 0


class EngineArenas(ABC):
    """All workers' arenas, and where each tensor of the manifest lies in them, in the manifest's order.

    placements: one for each tensor. Empty, with `reason`, where the engine's weights are not in arenas: then nobody
        can update them.
    reloads: whether vLLM has to make something of what was written before it computes with it.
    nccl: version of the workers' NCCL, 0 where they have none. free: bytes of the device's memory that nobody uses.
    """

    nccl = 0
    free = 0

    def __init__(self, placements: Sequence[Placement] = (), reloads: bool = False, reason: str = "") -> None:
        self.placements = list(placements)
        self.reloads = reloads
        self.reason = reason

    @property
    def manifest(self) -> Manifest:
        """The tensors that an update carries."""
        return Manifest(tuple(p.spec for p in self.placements))

    @property
    @abstractmethod
    def handles(self) -> list[Handle]:
        """The arenas, to hand on."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that hold the policy, each once; none for host memory."""
        return tuple(dict.fromkeys(handle.gpu for handle in self.handles if handle.gpu))

    @property
    def stage_bytes(self) -> int:
        """What one worker needs at most to stage an update that comes by NCCL."""
        if self.workers < 2:
            return self.manifest.nbytes
        sizes = Counter[int]()
        for handle in self.handles:
            sizes[handle.rank] += handle.size
        return max(sizes.values()) + 2 * WINDOW_BYTES

    @property
    def workers(self) -> int:
        """How many hold parts of it."""
        return len({handle.rank for handle in self.handles})

    def close(self) -> None:  # noqa: B027  # most have nothing to let go of
        """Let go of the workers, which are about to end."""

    @abstractmethod
    async def find_digest(self) -> int:
        """Digest of the whole policy as the engine holds it. Reads every byte."""

    @abstractmethod
    async def write_staged(self, staging: Staging) -> None:
        """Scatter what was staged into the engine's memory. Generation must be stopped."""


class HostArenas(EngineArenas):
    """Arenas of host memory, mapped here too."""

    def __init__(
        self,
        arenas: Sequence[Arena] = (),
        placements: Sequence[Placement] = (),
        reloads: bool = False,
        reason: str = "",
        *,
        ranks: Sequence[int] = (),
    ) -> None:
        super().__init__(placements, reloads, reason)
        self.arenas = list(arenas)
        self._ranks = list(ranks) or [0] * len(self.arenas)

    @property
    def handles(self) -> list[Handle]:
        pairs = zip(self.arenas, self._ranks, strict=True)
        return [Handle(arena.fd, arena.size, rank=rank) for arena, rank in pairs]

    @cached_property
    def _reading(self) -> Reading:
        return Reading(self.placements, self.arenas)

    def digest(self) -> int:
        """What `find_digest` finds.

        Raises:
            DataLoss: DIGEST_MISMATCH, ranks that hold the same part of a tensor hold different values.
        """
        try:
            return combine(self._reading.digests())
        except ValueError as error:
            raise DataLoss(Reason.DIGEST_MISMATCH, str(error)) from error

    def write(self, tensors: Sequence[torch.Tensor]) -> None:
        """Scatter `tensors`, in the manifest's order, dtypes and shapes, into the engine's memory."""
        pairs = zip(self.placements, tensors, strict=True)
        copy([pair for placement, tensor in pairs for pair in placement.pairs(self.arenas, tensor)])

    async def find_digest(self) -> int:
        return await asyncio.to_thread(self.digest)

    async def write_staged(self, staging: Staging) -> None:
        await asyncio.to_thread(self.write, staging.complete())
