"""What the client hands out: plain values, made of the contract's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from tandem.errors import invalid
from tandem.inference.v1 import inference_pb2
from tandem.trainer.v1 import job_pb2, trainer_pb2


class JobState(StrEnum):
    """Where a job is in its life. docs/jobs.md has the moves between them."""

    UNSPECIFIED = "UNSPECIFIED"
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    DELETING = "DELETING"

    @property
    def is_over(self) -> bool:
        """Whether a job leaves it by nothing but a call.

        >>> JobState.FAILED.is_over, JobState.RETRYING.is_over
        (True, False)
        """
        return self in (JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job."""

    sequence: int
    """Of the job's events, from 1, without gaps."""
    time: datetime
    """When it happened, in UTC."""
    attempt: int
    """The attempt that it is of."""


@dataclass(frozen=True, slots=True)
class StateChange(Event):
    """The job came into another state."""

    old_state: JobState
    """Where it was: UNSPECIFIED in a job's first event."""
    state: JobState
    """Where it is."""
    reason: str
    """Why, for people."""


@dataclass(frozen=True, slots=True)
class Metrics(Event):
    """Figures of the steps since the last such event."""

    step: int
    """Optimizer's steps done."""
    max_steps: int
    """Optimizer's steps in all; 0 while that is not known."""
    epoch: float
    """Passes over the dataset done."""
    values: Mapping[str, float]
    """Figures by TRL's names: reward, loss, completions/mean_length, tandem/..."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout of a training."""

    prompt: str
    """What was asked."""
    completion: str
    """What the policy wrote."""
    rewards: Mapping[str, float]
    """What it earned, by the reward's name."""
    advantage: float | None
    """Its advantage, where the algorithm has such."""
    weight_version: int
    """The weight version that the engine had when it was sampled."""


@dataclass(frozen=True, slots=True)
class Samples(Event):
    """Some of the rollouts of a step."""

    step: int
    """Optimizer's steps done when they were logged."""
    samples: tuple[Sample, ...]
    """The rollouts."""


@dataclass(frozen=True, slots=True)
class Log(Event):
    """A line of the job's output, or of its engine's."""

    text: str
    """Without the line's end."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is complete."""

    step: int
    """Optimizer's steps done."""
    path: str
    """A folder on the service's host, as transformers writes it."""
    bytes: int
    """The size of its files."""
    time: datetime
    """When it was complete, in UTC."""


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint is complete."""

    checkpoint: Checkpoint
    """Which."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled completion, or with `stream` what is new of it."""

    prompt_index: int
    """Which prompt of the call, from 0."""
    rollout_index: int
    """Which rollout of that prompt, from 0."""
    text: str
    """The text."""
    token_ids: tuple[int, ...]
    """The sampled tokens, the end-of-sequence token included."""
    logprobs: tuple[float, ...]
    """Their logprobs, if asked for."""
    weight_versions: tuple[tuple[int, int], ...]
    """The weight versions that sampled them, in order, each with its number of tokens."""
    finish_reason: str = field(default="")
    """Why it ended: STOP, LENGTH, ABORTED, REPETITION. Empty if it has not."""


KINDS: dict[type[Event], trainer_pb2.EventKind] = {
    StateChange: trainer_pb2.EVENT_KIND_STATE,
    Metrics: trainer_pb2.EVENT_KIND_METRICS,
    Samples: trainer_pb2.EVENT_KIND_SAMPLES,
    Log: trainer_pb2.EVENT_KIND_LOG,
    CheckpointSaved: trainer_pb2.EVENT_KIND_CHECKPOINT,
}
"""The contract's name of each kind of event."""


def state_of(number: int) -> JobState:
    """The state of its number; one of a newer service is UNSPECIFIED."""
    known = number in job_pb2.JobState.values()
    return JobState(job_pb2.JobState.Name(number).removeprefix("JOB_STATE_") if known else "UNSPECIFIED")


def wire_state(state: JobState | str) -> str:
    """The contract's name of a state. Raises InvalidArgument where there is no such state."""
    try:
        return f"JOB_STATE_{JobState(state)}"
    except ValueError:
        names = ", ".join(name for name in JobState if name != JobState.UNSPECIFIED)
        raise invalid("states", f"there is no state {state!r}; there are {names}") from None


def time_of(message: Any, name: str) -> datetime | None:
    """The time in a field of a message; None if it is not set."""
    return getattr(message, name).ToDatetime(UTC) if message.HasField(name) else None


def event_of(message: job_pb2.JobEvent) -> Event:
    """The event of its message. One of a kind that this client does not know is a plain `Event`."""
    head = (message.sequence, message.time.ToDatetime(UTC), message.attempt)
    match message.WhichOneof("event"):
        case "state":
            change = message.state
            return StateChange(*head, state_of(change.old_state), state_of(change.state), change.reason)
        case "metrics":
            figures = message.metrics
            return Metrics(*head, figures.step, figures.max_steps, figures.epoch, dict(figures.values))
        case "samples":
            return Samples(*head, message.samples.step, tuple(map(_sample, message.samples.samples)))
        case "log":
            return Log(*head, message.log.text)
        case "checkpoint":
            return CheckpointSaved(*head, checkpoint_of(message.checkpoint))
    return Event(*head)


def _sample(message: job_pb2.RolloutSample) -> Sample:
    advantage = message.advantage if message.HasField("advantage") else None
    return Sample(
        message.prompt, message.completion, dict(message.rewards), advantage, message.weight_version
    )


def checkpoint_of(message: job_pb2.Checkpoint) -> Checkpoint:
    """The checkpoint of its message."""
    return Checkpoint(message.step, message.path, message.bytes, message.time.ToDatetime(UTC))


def rollout_of(message: inference_pb2.Rollout) -> Rollout:
    """The rollout of its message."""
    reason = inference_pb2.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_")
    return Rollout(
        message.prompt_index,
        message.rollout_index,
        message.text,
        tuple(message.token_ids),
        tuple(message.logprobs),
        tuple((span.weight_version, span.num_tokens) for span in message.version_spans),
        "" if reason == "UNSPECIFIED" else reason,
    )
