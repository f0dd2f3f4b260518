"""The states of a job and the moves between them: one table, which docs/jobs.md repeats."""

from __future__ import annotations

from enum import StrEnum

from tandem.errors import FailedPrecondition, Reason


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DELETING = "DELETING"


class Move(StrEnum):
    """What may happen to a job."""

    START = "START"
    """The service starts its processes."""
    RUN = "RUN"
    """Its first step begins."""
    SUCCEED = "SUCCEED"
    """Its processes ended with all steps done."""
    FAIL = "FAIL"
    """It cannot go on."""
    RETRY = "RETRY"
    """Its processes died, and it may start again."""
    STOP = "STOP"
    """Its processes ended as they were told."""
    CANCEL = "CANCEL"
    """Somebody wants it to end."""
    RESUME = "RESUME"
    """Somebody wants it to go on."""
    DELETE = "DELETE"
    """Somebody wants it gone."""


MOVES: dict[tuple[JobState, Move], JobState] = {
    (JobState.QUEUED, Move.START): JobState.STARTING,
    (JobState.QUEUED, Move.FAIL): JobState.FAILED,
    (JobState.QUEUED, Move.CANCEL): JobState.CANCELLED,
    (JobState.STARTING, Move.RUN): JobState.RUNNING,
    (JobState.STARTING, Move.SUCCEED): JobState.SUCCEEDED,  # a resumed one that had all steps done
    (JobState.STARTING, Move.FAIL): JobState.FAILED,
    (JobState.STARTING, Move.RETRY): JobState.RETRYING,
    (JobState.STARTING, Move.CANCEL): JobState.CANCELLING,
    (JobState.RUNNING, Move.SUCCEED): JobState.SUCCEEDED,
    (JobState.RUNNING, Move.FAIL): JobState.FAILED,
    (JobState.RUNNING, Move.RETRY): JobState.RETRYING,
    (JobState.RUNNING, Move.CANCEL): JobState.CANCELLING,
    (JobState.RETRYING, Move.START): JobState.STARTING,
    (JobState.RETRYING, Move.FAIL): JobState.FAILED,
    (JobState.RETRYING, Move.CANCEL): JobState.CANCELLED,
    (JobState.CANCELLING, Move.SUCCEED): JobState.SUCCEEDED,  # it was done before it was told
    (JobState.CANCELLING, Move.STOP): JobState.CANCELLED,
    (JobState.CANCELLING, Move.CANCEL): JobState.CANCELLING,
    (JobState.CANCELLED, Move.CANCEL): JobState.CANCELLED,
    (JobState.CANCELLED, Move.RESUME): JobState.QUEUED,
    (JobState.FAILED, Move.RESUME): JobState.QUEUED,
    **{(state, Move.DELETE): JobState.DELETING for state in JobState},
}
"""The state that a move leads to. What is not here is illegal."""

#: States in which a job has processes, or may have.
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.CANCELLING})
#: States that a job leaves by nothing but a call.
TERMINAL = frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED})
#: States in which a job waits for its start.
WAITING = frozenset({JobState.QUEUED, JobState.RETRYING})


def after(job_id: str, state: JobState, move: Move) -> JobState:
    """The state that `move` leads to.

    Raises:
        FailedPrecondition: JOB_STATE, it is not legal.
    """
    try:
        return MOVES[state, move]
    except KeyError:
        raise FailedPrecondition(
            Reason.JOB_STATE,
            f"job {job_id} is {state}, and cannot {move} there",
            metadata={"job_id": job_id, "state": state},
        ) from None
