"""Arenas in GPUs' memory. The service has no CUDA context of its own: the workers digest and write for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from inference_service import passing
from inference_service.arenas import EngineArenas, Handle
from inference_service.engine import Engine
from inference_service.link import Link
from inference_service.staging import Staging
from tandem.errors import DataLoss, Reason
from weight_transfer.digest import combine
from weight_transfer.parts import made_up
from weight_transfer.placement import Placement


class DeviceArenas(EngineArenas):
    """Arenas of one GPU or of several, a worker's each, of which the service has the descriptors alone."""

    def __init__(
        self,
        engine: Engine,
        handles: Sequence[Handle],
        placements: Sequence[Placement],
        reloads: bool = False,
        *,
        nccl: int = 0,
        free: int = 0,
    ) -> None:
        super().__init__(placements, reloads)
        self.nccl, self.free = nccl, free
        self._engine = engine
        self._handles = list(handles)
        self.link = Link(engine, self.workers, self.manifest)

    def __del__(self) -> None:
        for handle in self._handles:
            os.close(handle.fd)

    def close(self) -> None:
        self.link.close()

    @property
    def handles(self) -> list[Handle]:
        return self._handles

    async def find_digest(self) -> int:
        """What `EngineArenas.find_digest` says.

        Raises:
            DataLoss: DIGEST_MISMATCH, ranks that hold the same part of a tensor hold different values.
        """
        if len({handle.rank for handle in self._handles}) == 1:
            (found,) = await self._engine.call_workers("tandem_digest")
            return int(found)
        answers = await self._engine.call_workers("tandem_sums")
        try:
            return self._digest({answer["rank"]: answer["sums"] for answer in answers})
        except ValueError as error:
            raise DataLoss(Reason.DIGEST_MISMATCH, str(error)) from error

    def _digest(self, sums: Mapping[int, Sequence[int]]) -> int:
        """Of the workers' sums, by rank: each worker's are of its own blocks, in the order of all."""
        coming = {rank: iter(of_rank) for rank, of_rank in sums.items()}
        rank_of = [handle.rank for handle in self._handles]
        return combine(
            [made_up(p, [next(coming[rank_of[b.arena]]) for b in p.blocks]) for p in self.placements]
        )

    async def write_staged(self, staging: Staging) -> None:
        staging.complete()
        manifest = self.manifest
        offsets = {spec.name: at for spec, at in zip(manifest, manifest.offsets, strict=False)}
        async with passing.offered([staging.arena.fd]) as path:
            await self._engine.call_workers("tandem_write", path, staging.arena.size, offsets)
