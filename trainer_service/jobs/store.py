"""Where jobs are kept: the store's promises, and the choice of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.states import JobState, Move


class EventKind(StrEnum):
    """What an event tells of."""

    STATE = "STATE"
    METRICS = "METRICS"
    SAMPLES = "SAMPLES"
    LOG = "LOG"
    CHECKPOINT = "CHECKPOINT"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job."""

    kind: EventKind
    time: float
    """Seconds since 1970."""
    attempt: int
    body: Mapping[str, Any]
    """By the contract's field names."""
    sequence: int = 0
    """Of the job's events, from 1, without gaps. 0 until the store has numbered it."""


@dataclass(frozen=True, slots=True)
class Offsets:
    """How far a job's files have been read into the store, in bytes."""

    events: int = 0
    output: int = 0
    engine: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is stored. Times are seconds since 1970."""

    number: int
    """Rises with each job of the store."""
    id: str
    spec: JobSpec
    state: JobState
    create_time: float
    reason: str = ""
    start_time: float | None = None
    end_time: float | None = None
    attempt: int = 0
    retries: int = 0
    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    last_sequence: int = 0
    gpus: Sequence[str] = ()
    process: str = ""
    """The identity of the process that runs it, `processes.Identity` as text; empty while there is none."""
    offsets: Offsets = field(default_factory=Offsets)


class Store(ABC):
    """Keeps jobs and their events. Methods block, and may be called from any thread.

    Each is done wholly or not at all, and what it returned from stays, whatever kills the process. All raise:

    * NotFound: JOB_NOT_FOUND.
    * ResourceExhausted: DISK_FULL, and nothing changed.
    * Unavailable: UNREACHABLE, the database does not answer.
    """

    @abstractmethod
    def lock(self) -> None:
        """Be the only service on this store until `close` or the process's end, however that comes.

        Raises:
            FailedPrecondition: STORE_IN_USE.
        """

    @abstractmethod
    def create(self, job_id: str, spec: JobSpec, request_id: str = "") -> Job:
        """Keep a new job, queued; or the job that this request made before.

        Raises:
            InvalidArgument: the request made another job before.
        """

    @abstractmethod
    def requested(self, request_id: str, spec: JobSpec) -> Job | None:
        """The job that a request made before, if it did.

        Raises:
            InvalidArgument: it made another one.
        """

    @abstractmethod
    def get(self, job_id: str) -> Job:
        """The job."""

    @abstractmethod
    def find(
        self,
        *,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] | None = None,
        limit: int = 0,
        before: int = 0,
    ) -> list[Job]:
        """Jobs, the newest first.

        Args:
            states: only jobs in one of these, if there are any.
            labels: only jobs with all of these.
            limit: at most so many; 0 is all.
            before: only jobs of smaller numbers; 0 is all.
        """

    @abstractmethod
    def count(self) -> dict[JobState, int]:
        """How many jobs there are in each state."""

    @abstractmethod
    def move(self, job_id: str, move: Move, reason: str = "", **changes: Any) -> Job:
        """Bring a job into another state, by the table in `states`, with an event, and with its `end_time` to an end.

        Args:
            job_id: the job.
            move: what happens.
            reason: why, for people.
            changes: further fields of the job to set.

        Raises:
            FailedPrecondition: JOB_STATE, the move is not legal.
        """

    @abstractmethod
    def append(self, job_id: str, events: Sequence[Event], **changes: Any) -> Job:
        """Number events and keep them, and set fields of the job, in one."""

    @abstractmethod
    def events(
        self, job_id: str, after: int = 0, kinds: Collection[EventKind] = (), limit: int = 500
    ) -> list[Event]:
        """A job's events after a sequence number, in order. Of a job that is not there, there are none."""

    @abstractmethod
    def delete(self, job_id: str) -> None:
        """Forget a job and its events."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, the lock too."""


def open_store(url: str, folder: Path) -> Store:
    """The store at a URL of SQLAlchemy's; where that is empty, an SQLite file in `folder`.

    Raises:
        InvalidArgument: the URL is malformed, its driver is not installed, or nothing answers there.
    """
    from trainer_service.jobs.sql import SqlStore

    return SqlStore(url or f"sqlite:///{folder / 'jobs.db'}")
