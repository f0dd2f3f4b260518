"""What outlives its caller: an engine that goes to sleep or wakes up, and adapters that are loaded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from inference_service import loras
from tandem.errors import Aborted
from tests.played_engine import Core, core, engine

__all__ = ["core", "engine"]  # fixtures


class Workers:
    """Stands for the workers: a call hangs until it may go on."""

    def __init__(self, engine: Any) -> None:
        self.called: list[str] = []
        self.go_on = asyncio.Event()
        engine.llm.collective_rpc = self.collective_rpc
        engine.llm.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))

    async def collective_rpc(self, method: str, **_: Any) -> list[int]:
        self.called.append(method)
        await self.go_on.wait()
        return [3, 5]


async def test_sleep_and_wake_up_go_on_when_their_caller_leaves(core: Core, engine: Any) -> None:
    """Half asleep is no state: who asks next is told what is so."""
    workers, told = Workers(engine), []
    for call, asleep in ((engine.sleep, True), (engine.wake_up, False)):
        workers.go_on.clear()
        calling = asyncio.ensure_future(call(lambda: told.append(engine.asleep)))
        await asyncio.sleep(0.05)
        assert engine.asleep
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling
        workers.go_on.set()
        await asyncio.wait(engine._ending, timeout=1)
        assert engine.asleep is engine.paused is told[-1] is asleep
    assert workers.called == ["tandem_sleep", "tandem_wake_up"]
    assert len(told) == 2


async def test_a_sleep_that_waits_ends_with_its_caller_or_a_wake_up(core: Core, engine: Any) -> None:
    workers = Workers(engine)
    workers.go_on.set()
    core.silent = {"wait"}
    for end in ("cancel", "wake"):
        sleeping = asyncio.ensure_future(engine.sleep())
        await asyncio.sleep(0.05)
        if end == "cancel":
            sleeping.cancel()
        else:
            await asyncio.wait_for(engine.wake_up(), 1)
        with pytest.raises((Aborted, asyncio.CancelledError)):
            await asyncio.wait_for(sleeping, 1)
        assert not engine.asleep
        assert not engine.paused
    assert workers.called == []


async def test_a_slow_folder_holds_up_nobody_and_kills_nothing(
    core: Core, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine._timeout_s = 0.25
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    save_file({"m.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    reached, go_on, copied, copy = threading.Event(), threading.Event(), threading.Event(), loras._copy

    def slow(*args: Any) -> None:
        reached.set()
        assert go_on.wait(10)
        copy(*args)
        copied.set()

    async def add_lora(request: Any) -> None:
        core.told.append(request.lora_name)

    monkeypatch.setattr(loras, "_copy", slow)
    engine.llm.add_lora = add_lora
    engine.llm.vllm_config = SimpleNamespace(lora_config=True)
    loading = asyncio.ensure_future(engine.load_lora("x", str(tmp_path)))
    assert await asyncio.to_thread(reached.wait, 30)
    await asyncio.sleep(0.6)
    await asyncio.wait_for(engine.pause("a"), 1)
    go_on.set()
    await loading
    assert core.told == ["keep", "paused", "x"]
    assert engine.loras.names == ["x"]
    assert not engine.dead

    core.silent = {"keep"}  # a copy that is never loaded goes
    pausing = asyncio.ensure_future(engine.pause("a"))
    await asyncio.sleep(0.05)
    copied.clear()
    loading = asyncio.ensure_future(engine.load_lora("y", str(tmp_path)))
    assert await asyncio.to_thread(copied.wait, 30)
    assert len(list(engine.loras._folder.path.glob("[0-9]*"))) == 2
    loading.cancel()
    await asyncio.wait({loading})
    core.silent.clear()
    await pausing
    assert engine.loras.names == ["x"]
    assert len(list(engine.loras._folder.path.glob("[0-9]*"))) == 1
