"""Every state with every move: what is in the table happens, and nothing else does."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from tandem.errors import FailedPrecondition, Reason
from tandem.trainer.v1 import job_pb2
from trainer_service.jobs.states import ACTIVE, MOVES, TERMINAL, WAITING, JobState, Move, after

DOCUMENT = Path(__file__).parents[2] / "docs" / "jobs.md"


def documented() -> dict[tuple[str, str], str]:
    """The table of docs/jobs.md: rows are states, columns are moves."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if re.match(r"\| (`[A-Z]+`|state) +\|", line)
    ]
    moves = [cell.strip("`") for cell in rows[0][1:]]
    return {
        (row[0].strip("`"), move): cell.strip("`")
        for row in rows[1:]
        for move, cell in zip(moves, row[1:], strict=True)
        if cell.startswith("`")
    }


@pytest.mark.parametrize(("state", "move"), list(product(JobState, Move)))
def test_every_state_with_every_move(state: JobState, move: Move) -> None:
    wanted = documented().get((state.value, move.value))
    if wanted is not None:
        assert after("j", state, move) == wanted
        return
    with pytest.raises(FailedPrecondition, match=f"job j is {state}, and cannot {move} there") as raised:
        after("j", state, move)
    assert raised.value.reason is Reason.JOB_STATE
    assert raised.value.metadata == {"job_id": "j", "state": state}


def test_the_document_has_no_more() -> None:
    assert documented() == {(state.value, move.value): to.value for (state, move), to in MOVES.items()}


def test_the_contract_has_the_same_states() -> None:
    names = {name.removeprefix("JOB_STATE_") for name in job_pb2.JobState.DESCRIPTOR.values_by_name}
    assert names == {state.value for state in JobState} | {"UNSPECIFIED"}


def test_every_state_is_reached_and_left() -> None:
    reached = {JobState.QUEUED}
    while more := {to for (state, _), to in MOVES.items() if state in reached} - reached:
        reached |= more
    assert reached == set(JobState)
    for state in set(JobState) - {JobState.DELETING}:
        assert {to for (at, _), to in MOVES.items() if at is state} - {state}


def test_a_state_is_active_or_waits_or_is_the_end() -> None:
    assert ACTIVE | WAITING | TERMINAL | {JobState.DELETING} == set(JobState)
    assert not ACTIVE & WAITING | ACTIVE & TERMINAL | WAITING & TERMINAL
    by_itself = {Move.START, Move.RUN, Move.SUCCEED, Move.FAIL, Move.RETRY, Move.STOP}
    for state, move in MOVES:
        assert not (state in TERMINAL and move in by_itself)
