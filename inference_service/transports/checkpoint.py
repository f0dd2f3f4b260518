"""Checkpoint: nothing moves. The workers load again what they started from."""

from __future__ import annotations

from inference_service.engine import Engine
from inference_service.transports.base import Incoming


class FromCheckpoint(Incoming):
    """In place, and whole."""

    reloads = False  # vLLM loads all of it

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def check(self, digest: int | None) -> None:
        """Nobody else has it to compare with."""

    async def install(self) -> None:
        await self._engine.call_workers("tandem_restore")

    def release(self) -> None:
        """There is none."""
