"""An engine whose other process is played: tests say what it answers, and when."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.engine import Engine
from inference_service.launch import Launched, ModelInfo
from inference_service.stats import EngineStats

__all__ = ["Core", "core", "engine"]


class Core:
    """Stands for the engine's other process: remembers what it was told, and may never answer."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.clears: list[bool] = []
        self.silent: set[str] = set()
        self.outputs_queue: asyncio.Queue[int] = asyncio.Queue()

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.told.append(mode)
        self.clears.append(clear_cache)
        while mode in self.silent:  # noqa: ASYNC110  # as vLLM, it hears of nothing
            await asyncio.sleep(0.01)
        self.told.append("paused")

    async def resume_scheduler_async(self) -> None:
        self.told.append("resume")
        while "resume" in self.silent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def add_request_async(self, request: str) -> None:
        self.told.append(request)


@pytest.fixture
async def core() -> Core:
    return Core()


@pytest.fixture
async def engine(core: Core) -> Any:
    llm = SimpleNamespace(engine_core=core, errored=False, output_handler=None)
    info = ModelInfo("m", "id", 64, 64, "bfloat16", "processed_logprobs", 20, "0")
    made = Engine(Launched(llm, info, EngineStats()))
    yield made
    made.loras.close()
