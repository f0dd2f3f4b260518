"""Generation is stopped and let go on: one control call at a time, by whoever holds it, and every token is counted."""

from __future__ import annotations

import asyncio
import gc
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.errors import Aborted, Reason, Unavailable
from tests.played_engine import Core, core, engine

__all__ = ["core", "engine"]  # fixtures


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


@pytest.mark.parametrize("mode", ["keep", "wait"])
async def test_who_shall_write_is_told_to_only_when_kernels_are_done(
    engine: Any, core: Core, mode: str
) -> None:
    async def collective_rpc(method: str, *_: Any, **__: Any) -> list[None]:
        core.told.append(f"called {method}")
        await asyncio.sleep(0.05)
        core.told.append(f"done {method}")
        return [None]

    engine.llm.collective_rpc = collective_rpc
    await engine.halt("a", mode)
    assert not any("settle" in told for told in core.told), "nobody asked"
    await engine.release("a")
    engine._rest.stir()
    await engine.halt("update", mode, settle=True)
    assert "done tandem_settle" in core.told


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
    core.silent = {"abort"}
    pausing = asyncio.ensure_future(engine.pause("a", "abort"))
    other = asyncio.ensure_future(engine.pause("b"))
    await asyncio.sleep(0.05)
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    await other
    undone = ["keep", "paused"] if held else ["resume"]
    assert core.told == ["abort", *undone, "keep", "paused"]
    await engine.resume("b")
    assert engine.paused == held


@pytest.mark.parametrize("held", [False, True])
async def test_a_wait_that_is_given_up_is_undone(engine: Any, core: Core, held: bool) -> None:
    if held:
        await engine.pause("a")
    core.told.clear()
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    assert core.told == ["wait", *(["keep", "paused"] if held else ["resume"])]
    assert engine.paused == held


async def test_other_calls_are_done_while_rollouts_are_waited_for(engine: Any, core: Core) -> None:
    """Who cannot know how long they run must not keep everybody else away."""

    async def reset_prefix_cache() -> bool:
        return True

    engine.llm.reset_prefix_cache = reset_prefix_cache
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(engine.reset_prefix_cache(), 1)
    await asyncio.wait_for(engine.resume("b"), 1)  # not its pause
    assert engine.paused
    assert not pausing.done()
    core.silent.clear()
    await pausing
    assert core.told == ["wait", "paused"]


async def test_who_resumes_ends_his_own_wait(engine: Any, core: Core) -> None:
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(engine.resume("a"), 1)
    with pytest.raises(Aborted, match="while rollouts were waited for"):
        await asyncio.wait_for(pausing, 1)
    assert core.told == ["wait", "resume"]
    assert not engine.paused
    core.silent.clear()
    await engine.pause("a", "wait")  # it left nothing behind


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("who", ["a", "update"])
async def test_a_pause_takes_the_place_of_one_that_waits(
    engine: Any, core: Core, who: str, held: bool
) -> None:
    """vLLM answers the first when the second has frozen what it waits for."""
    if held:
        await engine.pause("a")
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(engine.pause(who), 1)
    with pytest.raises(Aborted, match="while rollouts were waited for"):
        await asyncio.wait_for(pausing, 1)
    assert core.told[-3:] == ["wait", "keep", "paused"]
    await engine.resume(who)
    assert engine.paused == (held and who == "update")


async def test_waits_come_one_after_the_other(engine: Any, core: Core) -> None:
    core.silent = {"wait"}
    first, second = [asyncio.ensure_future(engine.pause("a", "wait")) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(Aborted):
        await asyncio.wait_for(engine.pause("update", "wait"), 1)
    assert core.told == ["wait"]
    first.cancel()
    await asyncio.wait({first})
    core.silent.clear()
    await second
    assert core.told == ["wait", "resume", "wait", "paused"]
    assert engine.paused


async def test_a_wait_ends_with_the_engine(engine: Any, core: Core) -> None:
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    engine.llm.errored = True
    with pytest.raises(Unavailable):
        await asyncio.wait_for(pausing, 1)


async def test_a_hang_is_noticed_after_a_wait_was_given_up(engine: Any, core: Core) -> None:
    engine._timeout_s = 0.5

    async def resume_scheduler_async() -> None:
        await asyncio.Event().wait()

    core.resume_scheduler_async = resume_scheduler_async  # type: ignore[method-assign]
    core.silent = {"wait"}
    pausing = asyncio.ensure_future(engine.pause("a", "wait"))
    await asyncio.sleep(0.05)
    pausing.cancel()
    await asyncio.wait({pausing}, timeout=3)
    assert pausing.done()
    assert engine.dead


async def test_a_call_that_is_cancelled_before_its_turn_leaves_nothing(
    engine: Any, core: Core, recwarn: pytest.WarningsRecorder
) -> None:
    core.silent = {"keep"}
    first = asyncio.ensure_future(engine.pause("a"))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(engine.pause("b"))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.wait({second})
    del second  # its traceback holds what it would have done
    gc.collect()
    assert not [w for w in recwarn if "never awaited" in str(w.message)]
    core.silent.clear()
    await first


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

    async def collective_rpc(method: str, **_: Any) -> list[int]:
        called.append(method)
        return [7]

    engine.llm.collective_rpc = collective_rpc
    engine.llm.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    assert await engine.sleep() == 7
    assert await engine.sleep() == 0
    assert (called, engine.asleep, core.told) == (["tandem_sleep"], True, ["wait", "paused"])
    await engine.pause("update")
    await engine.wake_up()
    assert (called, engine.asleep) == (["tandem_sleep", "tandem_wake_up"], False)
    assert "resume" not in core.told
    await engine.resume("update")
    assert core.told[-1] == "resume"
    await engine.pause("update")
    with pytest.raises(Aborted):
        await engine.sleep()


async def test_requests_that_are_gathered_begin_together_where_nothing_else_runs(
    core: Core, engine: Any
) -> None:
    running = 0
    engine.llm.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: running)
    async with engine.gathering():
        assert core.told == ["keep", "paused"]
        assert not engine.paused, "nobody has to know of it"
    assert core.told == ["keep", "paused", "resume"]

    async with engine.gathering():
        await engine.pause("update")
        await engine.resume("update")
        assert core.told.count("resume") == 1, "not before all are there"
    assert core.told[-1] == "resume"

    async with engine.gathering():
        await engine.pause("update")
    assert core.told[-1] == "paused", "somebody stopped generation meanwhile"
    told = list(core.told)
    async with engine.gathering():
        pass
    assert core.told == told
    await engine.resume("update")

    running, told = 1, list(core.told)
    async with engine.gathering():
        pass
    assert core.told == told, "others are not stopped"
