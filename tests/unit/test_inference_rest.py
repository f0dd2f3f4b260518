"""An engine that has nothing to do is told to stop, and not waited for; nor is its answer when it goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tandem.errors import Reason, Unavailable
from tests.played_engine import Core, core, engine

__all__ = ["core", "engine"]  # fixtures


class Unfinished:
    """vLLM's account of requests."""

    def __init__(self) -> None:
        self.count = 0

    def get_num_unfinished_requests(self) -> int:
        return self.count


@pytest.fixture
def unfinished(engine: Any) -> Unfinished:
    engine.llm.output_processor = Unfinished()
    return engine.llm.output_processor


async def test_a_halted_engine_forgets_what_is_cached_while_its_caller_goes_on(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    forgotten = await engine.halt("a")
    assert (core.told[:3], core.clears) == (["keep", "paused", "keep"], [False, True])
    assert engine.paused
    await forgotten
    assert core.told == ["keep", "paused", "keep", "paused"]


async def test_an_engine_that_rests_is_told_and_not_waited_for(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    await (await engine.halt("a"))
    await engine.release("a")
    core.told.clear()
    core.silent = {"keep"}
    forgotten = await asyncio.wait_for(engine.halt("a"), 1)
    await engine.llm.engine_core.add_request_async("request")
    assert core.told == ["keep", "request"], "no request reaches it before it is stopped"
    assert engine.held_by("a")
    core.silent.clear()
    await forgotten


@pytest.mark.parametrize("stirs", ["a request", "one that runs", "a call of the workers"])
async def test_an_engine_that_had_something_to_do_is_waited_for(
    engine: Any, core: Core, unfinished: Unfinished, stirs: str
) -> None:
    async def collective_rpc(method: str, **_: Any) -> list[None]:
        return [None]

    engine.llm.collective_rpc = collective_rpc
    await (await engine.halt("a"))
    await engine.release("a")
    if stirs == "a request":
        await engine.llm.engine_core.add_request_async("request")
    elif stirs == "one that runs":
        unfinished.count = 1
    else:
        await engine.call_workers("tandem_digest")
    core.silent = {"keep"}
    halting = asyncio.ensure_future(engine.halt("a"))
    await asyncio.sleep(0.05)
    assert not halting.done()
    core.silent.clear()
    await (await halting)


async def test_a_device_is_known_to_be_done_only_where_it_was_waited_for(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    asked: list[str] = []

    async def collective_rpc(method: str, **_: Any) -> list[None]:
        asked.append(method)
        return [None]

    engine.llm.collective_rpc = collective_rpc
    await engine.pause("somebody")
    await (await engine.halt("a", settle=True))
    assert asked == ["tandem_settle"]
    await engine.release("a")
    await (await engine.halt("a", settle=True))
    assert asked == ["tandem_settle"], "and once is enough"


async def test_an_engine_that_is_quiet_is_seen_to_rest_before_the_next_update(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    await (await engine.halt("a"))
    await engine.release("a")
    await engine.llm.engine_core.add_request_async("request")
    core.told.clear()
    engine.quiet()
    await asyncio.sleep(0.1)
    assert core.told == ["keep", "paused", "resume"]
    core.silent = {"keep"}
    forgotten = await asyncio.wait_for(engine.halt("a"), 1)
    core.silent.clear()
    await forgotten


async def test_an_engine_that_is_quiet_is_left_alone_while_an_update_comes_beside_its_weights(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    await (await engine.halt("a"))
    await engine.release("a")
    await engine.llm.engine_core.add_request_async("request")
    core.told.clear()
    engine.arriving = True
    engine.quiet()
    await asyncio.sleep(0.1)
    assert not core.told


async def test_nobody_waits_for_the_answer_of_an_engine_that_is_let_go(engine: Any, core: Core) -> None:
    await engine.pause("a")
    core.silent = {"resume"}
    await asyncio.wait_for(engine.release("a"), 1)
    assert core.told[-1] == "resume"
    assert not engine.paused
    core.silent.clear()
    await engine.pause("b")  # once the answer is there


async def test_the_answer_of_a_dead_engine_is_an_error(
    engine: Any, core: Core, unfinished: Unfinished
) -> None:
    await (await engine.halt("a"))
    await engine.release("a")
    core.silent = {"keep"}
    forgotten = await engine.halt("a")
    engine.llm.errored = True
    with pytest.raises(Unavailable) as raised:
        await asyncio.wait_for(forgotten, 2)
    assert raised.value.reason == Reason.ENGINE_DEAD
