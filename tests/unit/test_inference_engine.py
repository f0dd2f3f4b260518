"""What the engine promises its callers whatever vLLM does: nothing hangs on a dead engine, control is for one at a
time, and after a pause every token is counted.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.engine import Engine
from inference_service.launch import Launched, ModelInfo
from inference_service.stats import EngineStats
from tandem.errors import Aborted, Reason, Unavailable


class Core:
    """Stands for the engine's other process: remembers what it was told, and may never answer."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.silent: set[str] = set()
        self.outputs_queue: asyncio.Queue[int] = asyncio.Queue()

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.told.append(mode)
        while mode in self.silent:  # noqa: ASYNC110  # as vLLM, it hears of nothing
            await asyncio.sleep(0.01)
        self.told.append("paused")

    async def resume_scheduler_async(self) -> None:
        self.told.append("resume")


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


async def test_a_call_to_an_engine_that_dies_meanwhile_ends(engine: Any, core: Core) -> None:
    core.silent = {"keep"}
    pausing = asyncio.ensure_future(engine.pause("a"))
    waiting = asyncio.ensure_future(engine.resume("b"))
    await asyncio.sleep(0.05)
    begin = time.monotonic()
    engine.llm.errored = True
    for call in (pausing, waiting):
        with pytest.raises(Unavailable) as raised:
            await asyncio.wait_for(call, 2)
        assert raised.value.reason == Reason.ENGINE_DEAD
    assert time.monotonic() - begin < 1
    with pytest.raises(Unavailable):
        await engine.pause("a")


async def test_control_calls_come_one_after_the_other(engine: Any, core: Core) -> None:
    core.silent = {"keep"}
    calls = [asyncio.ensure_future(engine.pause(who)) for who in "abc"]
    await asyncio.sleep(0.05)
    assert core.told == ["keep"]
    core.silent.clear()
    await asyncio.gather(*calls)
    assert core.told == ["keep", "paused"] * 3


async def test_generation_goes_on_when_the_last_has_let_go(engine: Any, core: Core) -> None:
    await engine.pause("a")
    await engine.pause("b")
    await engine.resume("a")
    assert engine.paused
    assert "resume" not in core.told
    await engine.resume("b")
    assert not engine.paused
    assert core.told[-1] == "resume"


@pytest.mark.parametrize("mode", ["wait", "abort"])
async def test_nobody_reaches_into_what_another_holds(engine: Any, core: Core, mode: str) -> None:
    await engine.pause("update")
    with pytest.raises(Aborted) as raised:
        await engine.pause("client", mode)
    assert raised.value.reason == Reason.LEASE_HELD
    assert core.told == ["keep", "paused"]
    await engine.resume("client")
    assert engine.paused


@pytest.mark.parametrize("held", [False, True])
async def test_a_pause_that_is_given_up_is_undone_before_the_next_call(
    engine: Any, core: Core, held: bool
) -> None:
    if held:
        await engine.pause("a")
    core.told.clear()
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    other = asyncio.ensure_future(engine.pause("b"))
    await asyncio.sleep(0.05)
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    await other
    undone = ["keep", "paused"] if held else ["resume"]
    assert core.told == ["wait", *undone, "keep", "paused"]
    await engine.resume("b")
    assert engine.paused == held


async def test_a_pause_waits_until_all_tokens_are_counted(engine: Any, core: Core) -> None:
    """vLLM's handler takes a step's outputs in slices, with turns of the loop between."""
    counted = 0

    async def handler() -> None:
        nonlocal counted
        while True:
            for _ in range(await core.outputs_queue.get()):
                for _ in range(3):
                    await asyncio.sleep(0)
                counted += 1

    engine.llm.output_handler = asyncio.ensure_future(handler())
    await asyncio.sleep(0)
    for _ in range(20):
        core.outputs_queue.put_nowait(500)
    await engine.pause("a")
    assert counted == 20 * 500
    engine.llm.output_handler.cancel()
    core.outputs_queue.put_nowait(1)
    await asyncio.wait_for(engine.pause("a"), 2)  # a handler that ended keeps nobody waiting


async def test_an_engine_that_hangs_is_given_up(core: Core, engine: Any) -> None:
    engine._timeout_s = 0.5
    core.silent.add("keep")
    begin = time.monotonic()
    with pytest.raises(Unavailable) as error:
        await engine.pause("client")
    assert error.value.reason is Reason.ENGINE_DEAD
    assert time.monotonic() - begin < 3
    assert engine.dead
    with pytest.raises(Unavailable):
        await engine.resume("client")


async def test_rollouts_that_are_waited_for_may_take_longer(core: Core, engine: Any) -> None:
    engine._timeout_s = 0.25
    core.silent.add("wait")
    pausing = asyncio.ensure_future(engine.pause("client", "wait"))
    await asyncio.sleep(0.6)
    assert not engine.dead
    core.silent.clear()
    await pausing
    assert engine.paused


async def test_who_else_holds_generation_keeps_it_over_a_sleep(core: Core, engine: Any) -> None:
    """vLLM's own wake-up lets the scheduler go on, whoever stopped it."""
    called: list[str] = []

    async def collective_rpc(method: str, **_: Any) -> list[None]:
        called.append(method)
        return [None]

    engine.llm.collective_rpc = collective_rpc
    engine.llm.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    await engine.sleep()
    await engine.sleep()
    assert (called, engine.asleep, core.told) == (["sleep"], True, ["wait", "paused"])
    await engine.pause("update")
    await engine.wake_up()
    assert (called, engine.asleep) == (["sleep", "wake_up"], False)
    assert "resume" not in core.told
    await engine.resume("update")
    assert core.told[-1] == "resume"
    await engine.pause("update")
    with pytest.raises(Aborted):
        await engine.sleep()
