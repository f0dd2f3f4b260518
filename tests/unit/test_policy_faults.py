"""The weight state machine: every await as a place where something breaks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from inference_service.policy import FIRST_VERSION, WeightState
from inference_service.rollouts import Track
from tandem.errors import Reason, Unavailable
from tests.policy_machine import Machine, free, outcome
from tests.policy_moves import (
    HELD,
    C,
    T,
    W,
    aborted,
    in_place,
    in_place_aliased,
    lost,
    restored,
    staged,
    torn,
)

pytestmark = pytest.mark.usefixtures("quiet")


def errors() -> list[BaseException]:
    return [RuntimeError("secret"), TimeoutError(), Unavailable(Reason.ENGINE_DEAD, "dead")]


FAULTS = [
    # way, call that fails, state afterwards
    (in_place, "pause keep", C),
    (in_place, "tandem_reload", T),
    (in_place, "count", T),
    (in_place, "forget", T),  # what an older version left would be read with the new one
    (in_place_aliased, "tandem_reload", T),
    (staged, "pause keep", C),
    (staged, "tandem_reload", T),
    (staged, "count", T),
    (staged, "forget", T),
    (restored, "pause keep", C),
    (lost, "abort", T),
]


@pytest.mark.parametrize("error", errors(), ids=repr)
@pytest.mark.parametrize(("way", "call", "after"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)))
async def test_a_call_to_the_engine_that_fails(
    way: Any, call: str, after: WeightState, error: BaseException
) -> None:
    m = Machine(reloads=True)
    m.policy.rollouts._running["r"] = Track(added=True)
    m.engine.failing[call] = error
    if way is lost:
        await way(m)  # nobody is told: the trainer is gone
    else:
        with pytest.raises((type(error), AssertionError)):
            await way(m)
    assert (m.policy.state, m.policy.version, m.held) == (after, FIRST_VERSION, False)
    assert m.engine.generating == (after is C)
    assert "secret" not in m.policy.torn
    assert bool(m.policy.torn) == (after is T), "a reason without words is a reason too"
    m.check()
    m.engine.failing.clear()
    m.policy.rollouts._running.clear()
    assert await outcome(in_place(m)) == ""
    assert (m.policy.state, m.engine.generating) == (C, True)


@pytest.mark.parametrize("way", [in_place, staged])
async def test_memory_that_fails(way: Any) -> None:
    m = Machine()
    m.arenas.failing = MemoryError()
    with pytest.raises(MemoryError):
        await way(m)
    assert (m.policy.state, m.engine.generating, m.held) == (T, False, False)
    m.arenas.failing = None
    assert await outcome(way(m)) == ""
    m.check()


@pytest.mark.parametrize("at", ["pause keep", "resume", "tandem_reload"])
@pytest.mark.parametrize("way", [in_place, staged])
async def test_the_engine_dies(way: Any, at: str) -> None:
    m = Machine(reloads=True)
    reached, go_on = m.engine.hang(at)
    task = asyncio.ensure_future(outcome(way(m)))
    await asyncio.wait_for(reached.wait(), 5)
    m.engine.dead = True
    go_on.set()
    assert await task == Reason.ENGINE_DEAD
    assert not m.held
    assert (
        await outcome(m.begin(in_place=True)) == await outcome(m.begin(in_place=False)) == Reason.ENGINE_DEAD
    )
    assert not m.held


async def test_no_version_is_committed_on_a_dead_engine() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    m.write()
    m.engine.dead = True
    assert await outcome(update.commit()) == Reason.ENGINE_DEAD
    assert (m.policy.version, m.held) == (FIRST_VERSION, False)


CANCELLED = [
    # way, where the caller is cancelled, versions committed in spite of it, state afterwards
    (in_place, "pause keep", 0, C),
    (in_place, "pause wait", 0, C),
    (in_place, "tandem_reload", 1, C),
    (in_place, "resume", 1, C),
    (staged, "pause keep", 1, C),
    (staged, "tandem_reload", 1, C),
    (staged, "resume", 1, C),
    (restored, "pause keep", 0, C),
    (restored, "tandem_restore", 1, C),
    (lost, "abort", 0, T),
    (aborted, "resume", 0, C),
]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("way", "at", "versions", "after"), CANCELLED, ids=lambda x: getattr(x, "__name__", str(x))
)
async def test_the_caller_is_cancelled(
    way: Any, at: str, versions: int, after: WeightState, times: int
) -> None:
    m = Machine(reloads=True)
    reached, go_on = m.engine.hang(at)
    if at == "pause wait":
        m.engine.hanging["pause wait"] = m.engine.hanging.pop(at)
        task = asyncio.ensure_future(m.begin(in_place=True, in_flight="wait"))
    else:
        task = asyncio.ensure_future(way(m))
    await asyncio.wait_for(reached.wait(), 5)
    if at.startswith("pause") and way is not staged:
        m.engine.hang("resume")[1].set()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await free(m)
    assert (m.policy.state, m.policy.version) == (after, FIRST_VERSION + versions)
    assert m.engine.generating == (after is C)
    m.policy.rollouts._running.clear()
    m.check()


@pytest.mark.parametrize("work", ["stage", "write", "digest"])
async def test_a_commit_goes_on_in_its_thread_when_its_caller_is_cancelled(work: str) -> None:
    m = Machine()
    update = await m.begin(in_place=work == "digest")
    digest = m.write()
    reached, go_on = m.arenas.hang()
    task = asyncio.ensure_future(update.commit(digest))
    if work == "stage":  # before anything reached a thread
        await asyncio.sleep(0)
    else:
        assert await asyncio.to_thread(reached.wait, 5)
        assert m.policy.state is W
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert m.held
    assert await outcome(m.begin(in_place=True)) == HELD
    go_on.set()
    await free(m)
    assert (m.policy.state, m.policy.version) == (C, FIRST_VERSION + 1)
    m.check()


async def test_a_failed_pause_never_lets_a_torn_engine_run() -> None:
    """The engine forgets that a holder held it when that holder's second pause fails."""
    m = Machine()
    await torn(m)
    m.engine.failing["pause keep"] = RuntimeError("no")
    assert await outcome(in_place(m)) == "", "a torn engine is stopped already"
    await torn(m2 := Machine())
    m2.engine.hang("pause keep")
    task = asyncio.ensure_future(m2.begin(in_place=True))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert not m2.engine.generating
