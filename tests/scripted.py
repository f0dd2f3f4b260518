"""A job service that does what a test says, for what no real one does on demand: streams that break, old answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from tandem.errors import FailedPrecondition, NotFound, Reason, TandemError, Unavailable
from tandem.rpc import to_status
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.trainer.v1.trainer_pb2_grpc import (
    TrainingJobServiceServicer,
    add_TrainingJobServiceServicer_to_server,
)

GONE = Unavailable(Reason.UNREACHABLE, "the connection broke")
Round = Callable[[pb.WatchJobRequest], Iterator[list[job_pb2.JobEvent]]]


def state(sequence: int, name: str, reason: str = "") -> job_pb2.JobEvent:
    change = job_pb2.StateChange(state=f"JOB_STATE_{name}", reason=reason)
    return job_pb2.JobEvent(sequence=sequence, attempt=1, state=change)


def line(sequence: int) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(sequence=sequence, attempt=1, log=job_pb2.LogLine(text=f"line {sequence}"))


class Script(TrainingJobServiceServicer):
    """Answers as the test says: a round for each stream that is opened, and the job as it is then."""

    def __init__(self) -> None:
        self.rounds: list[Round | TandemError] = []
        self.job = job_pb2.Job(id="j1", state=job_pb2.JOB_STATE_RUNNING)
        self.asked: list[pb.WatchJobRequest] = []
        self.created: list[pb.CreateJobRequest] = []
        self.checkpoints: list[job_pb2.Checkpoint] = []
        self.refuse: list[TandemError] = []
        self.deleted: list[str] = []
        self.listed: list[pb.ListJobsRequest] = []

    def over(self, name: str, last: int, reason: str = "") -> None:
        self.job.state = job_pb2.JobState.Value(f"JOB_STATE_{name}")
        self.job.last_sequence, self.job.reason = last, reason

    def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        if request.job_id != "j1":
            self._abort(context, NotFound(Reason.JOB_NOT_FOUND, f"there is no job {request.job_id}"))
        return pb.GetJobResponse(job=self.job)

    def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        self.over("CANCELLED", self.job.last_sequence)
        return pb.CancelJobResponse(job=self.job)

    def ResumeJob(self, request: pb.ResumeJobRequest, context: Any) -> pb.ResumeJobResponse:
        if self.job.state == job_pb2.JOB_STATE_RUNNING:
            self._abort(context, FailedPrecondition(Reason.JOB_STATE, "job j1 is RUNNING"))
        self.job.state = job_pb2.JOB_STATE_QUEUED
        return pb.ResumeJobResponse(job=self.job)

    def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        self.deleted.append(request.job_id)
        return pb.DeleteJobResponse()

    def CreateJob(self, request: pb.CreateJobRequest, context: Any) -> pb.CreateJobResponse:
        self.created.append(request)
        if self.refuse:
            self._abort(context, self.refuse.pop(0))
        return pb.CreateJobResponse(job=self.job)

    def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        self.listed.append(request)
        begin = int(request.page_token or 0)
        jobs = [job_pb2.Job(id=f"j{n}") for n in range(begin, min(begin + request.page_size, 5))]
        token = str(begin + len(jobs)) if begin + len(jobs) < 5 else ""
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        return pb.ListCheckpointsResponse(checkpoints=self.checkpoints)

    def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> Iterator[pb.WatchJobResponse]:
        self.asked.append(request)
        script = self.rounds.pop(0)
        if isinstance(script, TandemError):
            self._abort(context, script)
        else:
            try:
                for events in script(request):
                    yield pb.WatchJobResponse(events=events)
            except TandemError as error:
                self._abort(context, error)

    def _abort(self, context: Any, error: TandemError) -> None:
        status = to_status(error)
        context.set_trailing_metadata(status.trailing_metadata)
        context.abort(status.code, status.details)


@contextmanager
def served(script: Script, folder: Path) -> Iterator[str]:
    """Its address while it serves."""
    server = grpc.server(ThreadPoolExecutor(4))
    add_TrainingJobServiceServicer_to_server(script, server)
    server.add_insecure_port(f"unix:{folder}/t.sock")
    server.start()
    try:
        yield f"unix://{folder}/t.sock"
    finally:
        server.stop(None).wait(5)
