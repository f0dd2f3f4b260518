"""The weight state machine: every move in every state."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.policy import WeightState
from tests.policy_machine import Machine
from tests.policy_moves import (
    BASE,
    DIGEST,
    HELD,
    ORDER,
    STATES,
    TORN,
    C,
    S,
    T,
    W,
    abort_touched,
    abort_untouched,
    begin_on_future_base,
    begin_on_old_base,
    begin_staging,
    begin_writing,
    begin_writing_as_another,
    commit_half,
    commit_with_a_wrong_digest,
    committed,
    lose,
    read_digest,
    restore,
    stage_out_of_order,
    staging,
    stray,
    torn,
    torn_staging,
    torn_writing,
    write_and_commit,
    writing,
)

pytestmark = pytest.mark.usefixtures("quiet")

#: state: {event: (error, state afterwards, versions committed)}
TABLE: dict[Any, dict[Any, tuple[str, WeightState, int]]] = {
    committed: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: ("", W, 0),
        begin_staging: ("", S, 0),
        begin_on_old_base: (BASE, C, 0),
        begin_on_future_base: (BASE, C, 0),
        restore: ("", C, 1),
        read_digest: ("", C, 0),
    },
    staging: {
        begin_writing: (HELD, S, 0),
        begin_writing_as_another: (HELD, S, 0),
        begin_staging: (HELD, S, 0),
        begin_on_old_base: (HELD, S, 0),
        begin_on_future_base: (HELD, S, 0),
        restore: (HELD, S, 0),
        read_digest: ("", S, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, C, 0),
        commit_half: (ORDER, C, 0),
        stage_out_of_order: (ORDER, S, 0),
        abort_untouched: ("", C, 0),
        abort_touched: ("", C, 0),
        lose: ("", C, 0),
    },
    writing: {
        begin_writing: (HELD, W, 0),
        begin_writing_as_another: (HELD, W, 0),
        begin_staging: (HELD, W, 0),
        begin_on_old_base: (HELD, W, 0),
        begin_on_future_base: (HELD, W, 0),
        restore: (HELD, W, 0),
        read_digest: (HELD, W, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (DIGEST, T, 0),
        stage_out_of_order: (ORDER, W, 0),
        abort_untouched: ("", C, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    torn: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: ("", W, 0),
        begin_staging: ("", T, 0),
        begin_on_old_base: (BASE, T, 0),
        begin_on_future_base: (BASE, T, 0),
        restore: ("", C, 1),
        read_digest: ("", T, 0),
    },
    torn_staging: {
        begin_writing: (HELD, T, 0),
        begin_writing_as_another: (HELD, T, 0),
        begin_staging: (HELD, T, 0),
        begin_on_old_base: (HELD, T, 0),
        begin_on_future_base: (HELD, T, 0),
        restore: (HELD, T, 0),
        read_digest: ("", T, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (ORDER, T, 0),
        stage_out_of_order: (ORDER, T, 0),
        abort_untouched: (TORN, T, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    torn_writing: {
        begin_writing: (HELD, W, 0),
        begin_writing_as_another: (HELD, W, 0),
        begin_staging: (HELD, W, 0),
        begin_on_old_base: (HELD, W, 0),
        begin_on_future_base: (HELD, W, 0),
        restore: (HELD, W, 0),
        read_digest: (HELD, W, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (DIGEST, T, 0),
        stage_out_of_order: (ORDER, W, 0),
        abort_untouched: (TORN, T, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    stray: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: (HELD, T, 0),
        begin_staging: (HELD, T, 0),
        begin_on_old_base: (BASE, T, 0),
        begin_on_future_base: (HELD, T, 0),
        restore: (HELD, T, 0),
        read_digest: ("", T, 0),
    },
}
MOVES = [
    pytest.param(state, event, *after, id=f"{state.__name__}-{event.__name__}")
    for state, events in TABLE.items()
    for event, after in events.items()
]


def test_the_table_has_every_event_of_every_state() -> None:
    outside = set(TABLE[committed])
    inside = set(TABLE[writing])
    assert set(TABLE) == set(STATES)
    assert {state: set(events) for state, events in TABLE.items()} == {
        state: inside if state in (staging, writing, torn_staging, torn_writing) else outside
        for state in STATES
    }


@pytest.mark.parametrize(("state", "event", "error", "after", "committed"), MOVES)
async def test_every_move(state: Any, event: Any, error: str, after: WeightState, committed: int) -> None:
    m = Machine()
    await state(m)
    m.check()
    before, was_held = m.policy.version, m.held
    assert await event(m) == error
    assert (m.policy.state, m.policy.version - before) == (after, committed)
    m.check()
    refused = error in (HELD, BASE) or event in (stage_out_of_order, read_digest)
    begun = event.__name__.startswith("begin") and not error
    assert m.held == (begun or (refused and was_held))
    assert m.engine.generating == (after in (C, S))


WALK = [name for event in dict.fromkeys(e for events in TABLE.values() for e in events) for name in [event]]


@given(st.lists(st.sampled_from(WALK), max_size=25))
def test_any_walk_keeps_the_promises(events: list[Any]) -> None:
    """Whatever comes in whatever order: the lease comes back, versions rise by one, nothing serves a mix."""

    async def walk() -> None:
        m = Machine()
        for event in events:
            if event in TABLE[committed] or (m.held and m.update is not None):
                before = m.policy.version
                await event(m)
                assert m.policy.version - before in (0, 1)
                m.check()
        if m.held and m.update is not None:
            await m.update.lose("over")
        m.trainer.alive = m.another.alive = False
        m.check()
        await restore(m)
        assert (m.policy.state, m.held, m.engine.generating) == (C, False, True)

    asyncio.run(walk())
