"""The weight state machine: two at once, trainers that lost their lease, and what is told of it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from inference_service.servicers.weights import WeightServicer
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, Reason, Unavailable
from tandem.weights.v1 import weights_pb2
from tests.policy_machine import Machine, outcome
from tests.policy_moves import (
    HELD,
    C,
    S,
    T,
    W,
    abort_touched,
    aborted,
    commit_with_a_wrong_digest,
    in_place,
    in_place_aliased,
    lost,
    restored,
    staged,
    staging,
    stray,
    writing,
)
from weight_transfer.digest import combine, digest_tensors

pytestmark = pytest.mark.usefixtures("quiet")

# Two at once.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_of_two_begins_at_once_one_has_the_lease(first: bool, second: bool) -> None:
    m = Machine()
    results = await asyncio.gather(outcome(m.begin(in_place=first)), outcome(m.begin(in_place=second)))
    assert results == ["", HELD]


async def test_a_begin_that_pauses_has_the_lease_and_the_old_version_is_whole() -> None:
    m = Machine()
    reached, go_on = m.engine.hang("pause wait")
    first = asyncio.ensure_future(m.begin(in_place=True, in_flight="wait"))
    await reached.wait()
    assert m.policy.state is C, "nobody may write yet"
    assert await outcome(m.begin(in_place=True)) == HELD
    assert await outcome(m.begin(in_place=False)) == HELD
    assert await outcome(m.policy.restore()) == HELD
    assert await outcome(m.policy.digest()) == ""
    go_on.set()
    await first
    assert m.policy.state is W


async def test_a_digest_is_of_one_version_or_refused() -> None:
    m = Machine()
    reached, go_on = m.arenas.hang()
    reading = asyncio.ensure_future(m.policy.digest())
    assert await asyncio.to_thread(reached.wait, 5)
    await in_place_aliased(m)
    go_on.set()
    with pytest.raises(Aborted, match="while they were read"):
        await reading
    assert await m.policy.digest() == combine(digest_tensors(m.values(2)))


async def test_a_digest_does_not_mind_what_is_staged_meanwhile() -> None:
    m = Machine()
    before = m.arenas.digest()
    reached, go_on = m.arenas.hang()
    reading = asyncio.ensure_future(m.policy.digest())
    assert await asyncio.to_thread(reached.wait, 5)
    await staging(m)
    m.write()
    go_on.set()
    assert await reading == before


# A trainer that lost its lease.


async def test_a_stray_trainer_keeps_others_away_until_it_ends_or_commits() -> None:
    m = Machine()
    await stray(m)
    with pytest.raises(Aborted, match="still has the weights' memory"):
        await m.policy.restore()
    m.trainer.alive = False
    assert await outcome(restored(m)) == ""
    again = Machine()
    await stray(again)
    assert await outcome(in_place(again)) == ""
    assert await outcome(restored(again)) == ""


async def test_a_trainer_that_gave_up_by_itself_is_not_stray() -> None:
    for give_up in (abort_touched, commit_with_a_wrong_digest):
        m = Machine()
        await writing(m)
        await give_up(m)
        assert m.policy.state is T
        assert await outcome(restored(m)) == ""


# Small print.


async def test_an_update_ends_once() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    await update.commit(m.write())
    for end in (update.commit(1), update.abort(untouched=True, reason=""), update.lose("")):
        with pytest.raises(RuntimeError, match="ends once"):
            await end
    assert m.policy.state is C


async def test_in_flight_modes_reach_the_engine_when_generation_stops() -> None:
    for in_place_, mode in ((True, "abort"), (False, "wait")):
        m = Machine()
        update = await m.begin(in_place=in_place_, in_flight=mode)
        assert m.engine.calls == (["pause abort"] if in_place_ else [])
        await update.commit(m.write())
        assert f"pause {mode}" in m.engine.calls


async def test_a_staged_update_stops_generation_only_to_copy() -> None:
    m = Machine()
    update = await m.begin(in_place=False)
    digest = m.write()
    assert m.engine.generating
    reached, go_on = m.arenas.hang()
    task = asyncio.ensure_future(update.commit(digest))
    assert await asyncio.to_thread(reached.wait, 5)
    assert (m.engine.generating, m.policy.state) == (False, W)
    go_on.set()
    assert await task == 2
    assert m.engine.generating


@pytest.mark.parametrize("in_place", [True, False])
async def test_the_engine_knows_while_an_update_comes_beside_its_weights(in_place: bool) -> None:
    m = Machine()
    update = await m.begin(in_place=in_place)
    assert m.policy.engine.arriving is not in_place
    with contextlib.suppress(Unavailable):
        await update.abort(untouched=True, reason="enough")
    assert not m.policy.engine.arriving


async def test_every_change_is_told() -> None:
    m = Machine()
    await in_place(m)
    await staged(m)
    await lost(m)
    assert m.seen == [(W, 1), (C, 2), (S, 2), (W, 2), (C, 3), (W, 3), (T, 3)]


async def test_a_commit_without_a_digest_is_for_updates_that_moved_nothing() -> None:
    m = Machine()
    update = await m.begin(in_place=False)
    m.write()
    assert await outcome(update.commit()) == Reason.FIELD_INVALID
    assert m.policy.state is C
    assert await outcome(in_place_aliased(m)) == ""


async def test_a_torn_reason_is_one_short_line_of_words() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    await update.lose("so\nlong " * 1000)
    assert len(m.policy.torn) <= 500
    assert "\n" not in m.policy.torn
    error = m.policy.torn_error()
    assert error.metadata == {"weight_version": "1"}
    assert error.message.endswith("a full update or RestoreCheckpoint heals them")


async def test_weights_that_are_not_in_arenas_are_neither_restored_nor_read() -> None:
    m = Machine()
    m.arenas.reason = "quantized"
    for call in (m.policy.restore(), m.policy.digest()):
        with pytest.raises(FailedPrecondition, match="quantized"):
            await call
    assert (m.policy.state, m.held) == (C, False)


async def test_updates_and_failures_are_counted() -> None:
    m = Machine()
    await in_place(m)
    await staged(m)
    update = await m.begin(in_place=False)
    await update.lose("")
    await aborted(m)
    assert (m.policy.committed, m.policy.failed) == (2, 2)


@pytest.mark.parametrize("in_place", [True, False])
async def test_an_update_may_number_its_version(in_place: bool) -> None:
    """As a run's trainer does with an engine that was started again."""
    m = Machine()
    values = m.values(7)
    update = await m.begin(in_place=in_place, new_version=7)
    if in_place:
        for place, value in zip(m.tensors, values, strict=True):
            place.copy_(value)
    else:
        for i, value in enumerate(values):
            update.chunk(i, 0, value.numpy().tobytes())
    assert await update.commit(combine(digest_tensors(values))) == m.policy.version == 7
    for wrong, why in (
        (7, "above the base version 7"),
        (0, "above the base version 7"),
        (2**62, "less than"),
    ):
        with pytest.raises(InvalidArgument, match=rf"begin\.new_version: must be {why}"):
            await m.begin(in_place, new_version=wrong)
    assert not m.held


async def test_a_begin_that_is_cancelled_before_its_pause_has_its_turn_waits_for_none() -> None:
    m = Machine()
    reached, _ = m.engine.hang("pause keep")
    task = asyncio.ensure_future(m.begin(in_place=True))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)
    assert not m.held
    assert "resume" not in m.engine.calls, "a pause that was given up holds nothing"


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    m = Machine()
    servicer = WeightServicer(SimpleNamespace(policy=m.policy), 2.0, 1024, asyncio.Event())  # type: ignore[arg-type]
    before = list(m.policy.changed)
    watching = servicer.WatchWeightVersion(weights_pb2.WatchWeightVersionRequest(), None)
    assert (await anext(watching)).weight_version == m.policy.version
    assert len(m.policy.changed) == len(before) + 1
    await watching.aclose()  # type: ignore[attr-defined]
    assert m.policy.changed == before
