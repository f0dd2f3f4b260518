"""The trainer service's face: who may call, its health, its errors. No job runs."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import failure
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import FailedPrecondition, InvalidArgument, NotFound, Reason, TandemError
from tandem.rpc import Serving, ServingConfig, connect_aio, translate
from tandem.trainer.v1 import job_pb2, trainer_pb2_grpc
from tandem.trainer.v1 import trainer_pb2 as pb
from tests.jobs import spec, table
from trainer_service.jobs.attempts import Limits
from trainer_service.jobs.states import Move
from trainer_service.jobs.store import Event, EventKind, Store, open_store
from trainer_service.jobs.supervisor import Supervisor
from trainer_service.messages import event_message, spec_message, spec_of
from trainer_service.server import JOBS
from trainer_service.servicer import TrainingJobServicer

Stub = trainer_pb2_grpc.TrainingJobServiceStub


@pytest.fixture
def store(folder: Path) -> Store:
    made = open_store("", folder)
    made.lock()
    return made


@pytest.fixture
async def channel(folder: Path, store: Store) -> AsyncIterator[grpc.aio.Channel]:
    address = f"unix://{folder}/socket"
    serving = Serving(ServingConfig(addresses=(address,), token="right", handle_signals=False, grace_s=1))
    servicer = TrainingJobServicer(Supervisor(store, folder / "jobs", Limits()))
    add = trainer_pb2_grpc.add_TrainingJobServiceServicer_to_server
    serving.add(add, servicer, JOBS, long_lived=["WatchJob"])
    async with serving:
        serving.set_serving(JOBS, True)
        async with connect_aio(address, token="right") as opened:
            yield opened
    store.close()


async def refusal(call: Any) -> TandemError:
    return translate(await failure(call))


async def test_nobody_calls_without_the_token(folder: Path, channel: grpc.aio.Channel) -> None:
    async with connect_aio(f"unix://{folder}/socket", token="wrong") as other:
        stub = Stub(other)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: stub.CreateJob(pb.CreateJobRequest()),
            lambda: stub.GetJob(pb.GetJobRequest()),
            lambda: stub.ListJobs(pb.ListJobsRequest()),
            lambda: stub.WatchJob(pb.WatchJobRequest()).read(),
            lambda: stub.CancelJob(pb.CancelJobRequest()),
            lambda: stub.ResumeJob(pb.ResumeJobRequest()),
            lambda: stub.DeleteJob(pb.DeleteJobRequest()),
            lambda: stub.ListCheckpoints(pb.ListCheckpointsRequest()),
        ]
        assert len(calls) == len(pb.DESCRIPTOR.services_by_name["TrainingJobService"].methods)
        for call in calls:
            assert (await failure(call())).code() == grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(other)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=JOBS))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "method", ["GetJob", "CancelJob", "ResumeJob", "DeleteJob", "ListCheckpoints", "WatchJob"]
)
async def test_a_job_that_is_not_there(channel: grpc.aio.Channel, method: str) -> None:
    request = getattr(pb, f"{method}Request")
    for job_id, kind, reason in (
        ("nope", NotFound, Reason.JOB_NOT_FOUND),
        ("", InvalidArgument, Reason.FIELD_INVALID),
    ):
        call = getattr(Stub(channel), method)(request(job_id=job_id))
        error = await refusal(call.read() if method == "WatchJob" else call)
        assert isinstance(error, kind)
        assert error.reason is reason


def token(text: str) -> str:
    """A page token as the service makes them."""
    return base64.urlsafe_b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("CreateJob", pb.CreateJobRequest(), "job"),
        ("CreateJob", pb.CreateJobRequest(request_id="x" * 129, job=job_pb2.JobSpec()), "request_id"),
        ("CreateJob", pb.CreateJobRequest(job=job_pb2.JobSpec(model=job_pb2.Model())), "job.model.path"),
        ("ListJobs", pb.ListJobsRequest(page_size=0), "page_size"),
        ("ListJobs", pb.ListJobsRequest(page_size=1001), "page_size"),
        ("ListJobs", pb.ListJobsRequest(page_token="%"), "page_token"),
        ("ListJobs", pb.ListJobsRequest(page_token=token("9" * 30)), "page_token"),
        ("ListJobs", pb.ListJobsRequest(page_token=token("-1")), "page_token"),
        ("ListJobs", pb.ListJobsRequest(states=[77]), "states[0]"),
        ("ListJobs", pb.ListJobsRequest(labels={str(i): "x" for i in range(65)}), "labels"),
        ("ListJobs", pb.ListJobsRequest(labels={"a": "\0"}), "labels"),
        ("GetJob", pb.GetJobRequest(job_id="\0"), "job_id"),
        ("CreateJob", pb.CreateJobRequest(request_id="\0", job=job_pb2.JobSpec()), "request_id"),
        ("WatchJob", pb.WatchJobRequest(job_id="x", kinds=[1, 99]), "kinds[1]"),
    ],
)
async def test_bad_input_names_its_field(
    channel: grpc.aio.Channel, method: str, request_: Any, field: str
) -> None:
    call = getattr(Stub(channel), method)(request_)
    error = await refusal(call.read() if method == "WatchJob" else call)
    assert isinstance(error, InvalidArgument)
    assert field in [violation.field for violation in error.violations]


async def test_what_no_table_of_a_job_has_is_told_and_not_left_out(channel: grpc.aio.Channel) -> None:
    """Another language's client may send it: fields of a newer contract, and numbers that JSON does not have."""
    job = json_format.ParseDict(table(), job_pb2.JobSpec())
    job.training.MergeFromString(b"\xa0\x06\x01")  # the field 100
    job.rewards[0].MergeFromString(b"\xa2\x06\x01x")
    options = job.grpo.trl_options
    options.fields["a"].number_value = float("nan")
    options.fields["b"].struct_value.fields["c"].list_value.values.add().number_value = float("inf")
    error = await refusal(Stub(channel).CreateJob(pb.CreateJobRequest(job=job)))
    assert isinstance(error, InvalidArgument)
    unknown = "this service knows no field of this number: it may be older than its caller"
    assert {violation.field: violation.description for violation in error.violations} == {
        "job.rewards[0].100": unknown,
        "job.training.100": unknown,
        "job.grpo.trl_options.a": "must be a finite number, is nan",
        "job.grpo.trl_options.b.c[0]": "must be a finite number, is inf",
    }


async def test_pages(channel: grpc.aio.Channel, store: Store) -> None:
    for index in range(5):
        store.create(f"job-{index}", spec(labels={"odd": str(index % 2)}))
    token, pages = "", []
    while True:
        request = pb.ListJobsRequest(page_size=2, page_token=token)
        response = await Stub(channel).ListJobs(request)
        pages.append([job.id for job in response.jobs])
        if not (token := response.next_page_token):
            break
    assert pages == [["job-4", "job-3"], ["job-2", "job-1"], ["job-0"]]
    response = await Stub(channel).ListJobs(pb.ListJobsRequest(labels={"odd": "1"}))
    assert [job.id for job in response.jobs] == ["job-3", "job-1"]
    store.move("job-3", Move.CANCEL, "why")  # it was told of before, otherwise
    both = pb.ListJobsRequest(labels={"odd": "1"}, states=[job_pb2.JOB_STATE_CANCELLED])
    (found,) = (await Stub(channel).ListJobs(both)).jobs
    assert (found.id, found.state, found.reason) == ("job-3", job_pb2.JOB_STATE_CANCELLED, "why")
    assert found == (await Stub(channel).GetJob(pb.GetJobRequest(job_id="job-3"))).job
    assert spec_of(found.spec) == spec(labels={"odd": "1"})


async def test_a_job_that_waits_is_cancelled_resumed_and_deleted(
    channel: grpc.aio.Channel, store: Store
) -> None:
    store.create("job", spec())
    stub = Stub(channel)
    cancelled = (await stub.CancelJob(pb.CancelJobRequest(job_id="job"))).job
    assert cancelled.state == job_pb2.JOB_STATE_CANCELLED
    assert cancelled.HasField("end_time")
    resumed = (await stub.ResumeJob(pb.ResumeJobRequest(job_id="job"))).job
    assert resumed.state == job_pb2.JOB_STATE_QUEUED
    assert not resumed.HasField("end_time")
    error = await refusal(stub.ResumeJob(pb.ResumeJobRequest(job_id="job")))
    assert isinstance(error, FailedPrecondition)
    assert (error.reason, error.metadata["state"]) == (Reason.JOB_STATE, "QUEUED")
    await stub.DeleteJob(pb.DeleteJobRequest(job_id="job"))
    assert store.find() == []


async def test_a_watch_goes_on_after_a_sequence_number(channel: grpc.aio.Channel, store: Store) -> None:
    store.create("job", spec())
    store.append("job", [Event(EventKind.LOG, 1.0, 0, {"text": str(i)}) for i in range(2000)])
    store.move("job", Move.CANCEL)

    async def seen(**fields: Any) -> list[int]:
        call = Stub(channel).WatchJob(pb.WatchJobRequest(job_id="job", **fields))
        return [event.sequence async for response in call for event in response.events]

    assert await seen() == list(range(1, 2003))
    assert await seen(after_sequence=1990) == list(range(1991, 2003))
    assert await seen(kinds=[pb.EVENT_KIND_STATE]) == [1, 2002]
    assert await seen(after_sequence=9999) == []


def test_a_specification_survives_the_way() -> None:
    given = table(
        model={"path": "m", "lora": {"rank": 8, "target_modules": ["q_proj"], "mode": "adapter"}},
        rewards=[{"function": "a:b", "weight": 0.5}, {"builtin": "think_format_reward", "options": {"n": 3}}],
        inference={"managed": {"engine": {"max_model_len": 512, "gpu_memory_utilization": 0.5}}},
        grpo={"trl_options": {"beta": 0.04, "top_k": 5, "names": ["a"], "nested": {"x": 2}}},
        labels={"a": "b"},
    )
    message = json_format.ParseDict(given, job_pb2.JobSpec())
    read = spec_of(message)
    assert read == spec(**given)
    assert read.settings.trl_options == {"beta": 0.04, "top_k": 5, "names": ["a"], "nested": {"x": 2}}
    assert isinstance(read.settings.trl_options["top_k"], int)  # a Struct made a double of it
    assert spec_of(spec_message(read)) == read


def test_each_event_has_its_message() -> None:
    checkpoint = {"step": 1, "path": "/c", "bytes": 5, "time": 2.5}
    sample = {"prompt": "p", "completion": "c", "rewards": {"r": 1.0}, "weight_version": 3, "advantage": 0.5}
    bodies: dict[EventKind, dict[str, Any]] = {
        EventKind.STATE: {"old_state": "QUEUED", "state": "STARTING", "reason": "why"},
        EventKind.METRICS: {"step": 1, "max_steps": 2, "epoch": 0.5, "values": {"reward": 1.0}},
        EventKind.SAMPLES: {"step": 1, "samples": [sample]},
        EventKind.LOG: {"text": "line"},
        EventKind.CHECKPOINT: checkpoint,
    }
    for kind in EventKind:
        message = event_message(Event(kind, 1.5, 2, bodies[kind], 7))
        assert (message.sequence, message.attempt, message.time.ToMilliseconds()) == (7, 2, 1500)
        assert message.WhichOneof("event") == kind.lower()
