"""Arenas in a GPU's memory. The service has no CUDA context of its own: the worker digests and writes for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from inference_service import passing
from inference_service.arenas import EngineArenas, Handle
from inference_service.engine import Engine
from inference_service.link import Link
from inference_service.staging import Staging
from weight_transfer.placement import Placement


class DeviceArenas(EngineArenas):
    """Arenas of one GPU, of which the service has the descriptors alone."""

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
        self.link = Link(engine)
        self._engine = engine
        self._handles = list(handles)

    def __del__(self) -> None:
        for handle in self._handles:
            os.close(handle.fd)

    def close(self) -> None:
        self.link.close()

    @property
    def handles(self) -> list[Handle]:
        return self._handles

    async def find_digest(self) -> int:
        (found,) = await self._engine.call_workers("tandem_digest")
        return int(found)

    async def write_staged(self, staging: Staging) -> None:
        staging.complete()
        async with passing.offered([staging.arena.fd]) as path:
            await self._engine.call_workers("tandem_write", path, staging.arena.size)
