"""What is known of a job, for both clients."""

from __future__ import annotations

from datetime import UTC, datetime

from tandem.client.values import JobState, state_of, time_of
from tandem.errors import Cancelled, FailedPrecondition, Reason
from tandem.trainer.v1 import job_pb2


class JobView:
    """A job as the service last told of it."""

    def __init__(self, message: job_pb2.Job) -> None:
        self._message = message

    @property
    def id(self) -> str:
        """The service's name for it."""
        return self._message.id

    @property
    def spec(self) -> job_pb2.JobSpec:
        """What was submitted."""
        return self._message.spec

    @property
    def algorithm(self) -> str:
        """Its algorithm, as the spec names it: grpo."""
        return self._message.spec.WhichOneof("algorithm") or ""

    @property
    def state(self) -> JobState:
        """Where it is in its life."""
        return state_of(self._message.state)

    @property
    def reason(self) -> str:
        """Why it is in that state, for people."""
        return self._message.reason

    @property
    def step(self) -> int:
        """Optimizer's steps done."""
        return self._message.progress.step

    @property
    def max_steps(self) -> int:
        """Optimizer's steps in all; 0 while that is not known."""
        return self._message.progress.max_steps

    @property
    def attempt(self) -> int:
        """How many times it was started."""
        return self._message.attempt

    @property
    def create_time(self) -> datetime:
        """When it was submitted, in UTC."""
        return self._message.create_time.ToDatetime(UTC)

    @property
    def start_time(self) -> datetime | None:
        """When it last began to train."""
        return time_of(self._message, "start_time")

    @property
    def end_time(self) -> datetime | None:
        """When it last came to an end."""
        return time_of(self._message, "end_time")

    @property
    def last_sequence(self) -> int:
        """Sequence number of its last event."""
        return self._message.last_sequence

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs that it has, as the host numbers them."""
        return tuple(self._message.gpus)

    @property
    def folder(self) -> str:
        """Its folder on the service's host."""
        return self._message.folder

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state} {self.step}/{self.max_steps or '?'}>"

    def _raise_unless_succeeded(self) -> None:
        metadata = {"job_id": self.id, "state": self.state.value}
        why = f": {self.reason}" if self.reason else ""
        if self.state is JobState.CANCELLED:
            raise Cancelled(
                Reason.JOB_CANCELLED,
                f"job {self.id} was cancelled at step {self.step}{why}",
                metadata=metadata,
            )
        if self.state is not JobState.SUCCEEDED:
            raise FailedPrecondition(
                Reason.JOB_FAILED, f"job {self.id} failed at step {self.step}{why}", metadata=metadata
            )
