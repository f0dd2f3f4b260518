"""Shared: a trainer on this host writes memory that it has mapped, the engine's own or one beside it."""

from __future__ import annotations

import asyncio

from inference_service.arenas import EngineArenas
from inference_service.staging import MappedStaging
from inference_service.transports.base import Incoming, compare


class SharedInPlace(Incoming):
    """The trainer writes the live weights. Whether it did so before it gave up, it alone knows."""

    def __init__(self, arenas: EngineArenas) -> None:
        self._arenas = arenas

    async def check(self, digest: int | None) -> None:
        if digest is not None:
            compare(digest, await self._arenas.find_digest())

    async def install(self) -> None:
        """It is there."""

    def release(self) -> None:
        """There is none."""


class SharedStaged(Incoming):
    """The trainer writes memory of its session's, which is copied over in one short stop."""

    def __init__(self, arenas: EngineArenas, stage: MappedStaging) -> None:
        self._arenas = arenas
        self._stage = stage
        stage.use()

    async def check(self, digest: int | None) -> None:
        compare(digest, await asyncio.to_thread(self._stage.digest))

    async def install(self) -> None:
        await self._arenas.write_staged(self._stage)

    def release(self) -> None:
        """What is staged takes longer."""

    async def give_back(self) -> None:
        await asyncio.to_thread(self._stage.forget)
        self._stage.release()
