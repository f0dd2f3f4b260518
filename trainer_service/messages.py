"""Jobs between the contract's messages and Python."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import json_format, struct_pb2, timestamp_pb2
from google.protobuf.unknown_fields import UnknownFieldSet

from tandem.errors import Violation
from tandem.trainer.v1 import job_pb2 as pb
from tandem.trainer.v1 import trainer_pb2
from trainer_service.jobs.folder import Checkpoint
from trainer_service.jobs.reading import read, refusal
from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.states import JobState
from trainer_service.jobs.store import Event, EventKind, Job

#: The contract's states by Python's, and its kinds of events.
STATES: dict[JobState, Any] = {state: pb.JobState.Value(f"JOB_STATE_{state}") for state in JobState}
KINDS: dict[int, EventKind] = {trainer_pb2.EventKind.Value(f"EVENT_KIND_{kind}"): kind for kind in EventKind}
_MOST = 10_000
_made: dict[int, tuple[Job, str, pb.Job]] = {}
_specs: dict[int, tuple[JobSpec, pb.JobSpec]] = {}


def spec_of(message: pb.JobSpec) -> JobSpec:
    """Read a job. Raises InvalidArgument, naming each field at fault by its path under `job`."""
    if wrong := list(_unreadable(message, "job")):
        raise refusal(wrong)
    return read(_table(message), "job")


def job_message(job: Job, folder: str) -> pb.Job:
    """A job, with the path of its folder. Not to be changed: most of a list is what was told of before."""
    known = _made.get(job.number)
    if known is None or known[0] is not job or known[1] != folder:
        known = (job, folder, _job_message(job, folder))
        if len(_made) >= _MOST:
            _made.clear()
        _made[job.number] = known
    return known[2]


def _job_message(job: Job, folder: str) -> pb.Job:
    message = pb.Job(
        id=job.id,
        spec=_kept(job.spec),
        state=STATES[job.state],
        reason=job.reason,
        create_time=_time(job.create_time),
        attempt=job.attempt,
        retries=job.retries,
        progress=pb.Progress(step=job.step, max_steps=job.max_steps, epoch=job.epoch),
        last_sequence=job.last_sequence,
        gpus=job.gpus,
        folder=folder,
    )
    if job.start_time is not None:
        message.start_time.CopyFrom(_time(job.start_time))
    if job.end_time is not None:
        message.end_time.CopyFrom(_time(job.end_time))
    return message


def _kept(spec: JobSpec) -> pb.JobSpec:
    """`spec_message` of a specification that the store keeps, made once: a job's state changes, and this does not."""
    found = _specs.get(id(spec))
    if found is None:
        if len(_specs) >= _MOST:
            _specs.clear()
        found = _specs[id(spec)] = (spec, spec_message(spec))  # while it is here, no other one has its id
    return found[1]


def spec_message(spec: JobSpec) -> pb.JobSpec:
    """A job's specification, with what was not set by the user as it is."""
    return pb.JobSpec(**spec.model_dump(mode="json", exclude_none=True))


def event_message(event: Event) -> pb.JobEvent:
    """An event."""
    message = pb.JobEvent(sequence=event.sequence, time=_time(event.time), attempt=event.attempt)
    body: Mapping[str, Any] = event.body
    match event.kind:
        case EventKind.STATE:
            change = pb.StateChange(state=STATES[JobState(body["state"])], reason=body["reason"])
            if "old_state" in body:
                change.old_state = STATES[JobState(body["old_state"])]
            message.state.CopyFrom(change)
        case EventKind.METRICS:
            message.metrics.CopyFrom(pb.StepMetrics(**body))
        case EventKind.SAMPLES:
            samples = [pb.RolloutSample(**sample) for sample in body["samples"]]
            message.samples.CopyFrom(pb.RolloutSamples(step=body["step"], samples=samples))
        case EventKind.LOG:
            message.log.text = body["text"]
        case EventKind.CHECKPOINT:
            fields = {**body, "time": _time(body["time"])}
            message.checkpoint.CopyFrom(pb.Checkpoint(**fields))
    return message


def checkpoint_message(found: Checkpoint) -> pb.Checkpoint:
    """A checkpoint."""
    return pb.Checkpoint(step=found.step, path=str(found.path), bytes=found.nbytes, time=_time(found.time))


def _time(seconds: float) -> timestamp_pb2.Timestamp:
    message = timestamp_pb2.Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def _unreadable(message: Any, path: str) -> Iterator[Violation]:
    """What `_table` would leave out, or could not read."""
    if isinstance(message, struct_pb2.Struct):
        for name, value in message.fields.items():
            yield from _not_finite(value, f"{path}.{name}")
        return
    unknown_fields: Any = UnknownFieldSet(message)  # whose stub has no iterator
    for unknown in unknown_fields:
        yield Violation(
            f"{path}.{unknown.field_number}",
            "this service knows no field of this number: it may be older than its caller",
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for index, item in enumerate(value if field.is_repeated else [value]):
            at = f"{path}.{field.name}"
            yield from _unreadable(item, f"{at}[{index}]" if field.is_repeated else at)


def _not_finite(value: struct_pb2.Value, path: str) -> Iterator[Violation]:
    match value.WhichOneof("kind"):
        case "number_value" if not math.isfinite(value.number_value):
            yield Violation(path, f"must be a finite number, is {value.number_value}")
        case "struct_value":
            yield from _unreadable(value.struct_value, path)
        case "list_value":
            for index, item in enumerate(value.list_value.values):
                yield from _not_finite(item, f"{path}[{index}]")


def _table(message: Any) -> dict[str, Any]:
    """A message as a table of what is set, by the contract's names."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if isinstance(value, struct_pb2.Struct):
            found[field.name] = _whole(json_format.MessageToDict(value))
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(value)
        elif field.is_repeated:
            found[field.name] = [_table(item) if field.message_type is not None else item for item in value]
        else:
            found[field.name] = _table(value) if field.message_type is not None else value
    return found


def _whole(value: Any) -> Any:
    """A Struct has doubles alone: what has no fraction was a whole number, as TRL and vLLM want it."""
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
