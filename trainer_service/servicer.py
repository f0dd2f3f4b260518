"""TrainingJobService."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from tandem.errors import invalid
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.trainer.v1 import trainer_pb2_grpc
from trainer_service.jobs.states import JobState
from trainer_service.jobs.store import Job
from trainer_service.jobs.supervisor import Supervisor
from trainer_service.messages import (
    KINDS,
    STATES,
    checkpoint_message,
    event_message,
    job_message,
    spec_message,
    spec_of,
)

_PAGE = 100
_MAX_PAGE = 1000
_MAX_REQUEST_ID = 128
_MAX_LABELS = 64  # of a filter
_NUL = "\0"  # which no database takes into a text
#: Events of one message.
_BATCH = 64
_STATES = {value: state for state, value in STATES.items()}


class TrainingJobServicer(trainer_pb2_grpc.TrainingJobServiceServicer):
    """The jobs of a Supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._jobs = supervisor

    async def read(self) -> None:
        """Read the newest jobs, so that the first list is as quick as those after it."""
        found = await self._jobs.find(states=(), labels={}, limit=_MAX_PAGE, before=0)
        await asyncio.to_thread(lambda: [self._message(job) for job in found])

    async def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        if len(request.request_id.encode()) > _MAX_REQUEST_ID:
            raise invalid("request_id", f"has more than {_MAX_REQUEST_ID} bytes")
        if _NUL in request.request_id:
            raise invalid("request_id", "has a character NUL")
        if not request.HasField("job"):
            raise invalid("job", "is required")
        spec = spec_of(request.job)
        if request.validate_only:
            await self._jobs.check(spec)
            response = pb.CreateJobResponse()
            response.job.spec.CopyFrom(spec_message(spec))
            return response
        return pb.CreateJobResponse(job=self._message(await self._jobs.submit(spec, request.request_id)))

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        return pb.GetJobResponse(job=self._message(await self._jobs.get(_job_id(request))))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        size = request.page_size if request.HasField("page_size") else _PAGE
        if not 1 <= size <= _MAX_PAGE:
            raise invalid("page_size", f"must be from 1 to {_MAX_PAGE}, is {size}")
        if len(request.labels) > _MAX_LABELS:
            raise invalid("labels", f"has more than {_MAX_LABELS}")
        if any(_NUL in text for label in request.labels.items() for text in label):
            raise invalid("labels", "has a character NUL, as no job's have")
        found = await self._jobs.find(
            states=[_state(value, f"states[{i}]") for i, value in enumerate(request.states)],
            labels=dict(request.labels),
            limit=size + 1,
            before=_before(request.page_token),
        )
        more = len(found) > size
        token = base64.urlsafe_b64encode(str(found[size - 1].number).encode()).decode() if more else ""
        return pb.ListJobsResponse(jobs=[self._message(job) for job in found[:size]], next_page_token=token)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        kinds = []
        for i, value in enumerate(request.kinds):
            if value not in KINDS:
                raise invalid(f"kinds[{i}]", f"no EventKind {value}")
            kinds.append(KINDS[value])
        job_id = _job_id(request)
        async with aclosing(self._jobs.feed.watch(job_id, request.after_sequence, kinds)) as batches:
            async for batch in batches:
                for start in range(0, len(batch), _BATCH):
                    events = [event_message(event) for event in batch[start : start + _BATCH]]
                    yield pb.WatchJobResponse(events=events)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        return pb.CancelJobResponse(job=self._message(await self._jobs.cancel(_job_id(request))))

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:
        return pb.ResumeJobResponse(job=self._message(await self._jobs.resume(_job_id(request))))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        await self._jobs.delete(_job_id(request))
        return pb.DeleteJobResponse()

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Any
    ) -> pb.ListCheckpointsResponse:
        found = await self._jobs.checkpoints(_job_id(request))
        return pb.ListCheckpointsResponse(checkpoints=[checkpoint_message(one) for one in found])

    def _message(self, job: Job) -> Any:
        return job_message(job, f"{self._jobs.root}/{job.id}")


def _job_id(request: Any) -> str:
    if not request.job_id:
        raise invalid("job_id", "is required")
    if _NUL in request.job_id:
        raise invalid("job_id", "has a character NUL, as no job's has")
    return str(request.job_id)


def _state(value: int, field: str) -> JobState:
    if value not in _STATES:
        raise invalid(field, f"no JobState {value}")
    return _STATES[value]


def _before(token: str) -> int:
    if not token:
        return 0
    try:
        number = int(base64.urlsafe_b64decode(token.encode()).decode("ascii"))
    except ValueError:
        number = 0
    if not 0 < number < 2**63:
        raise invalid("page_token", "is none that a response had")
    return number
