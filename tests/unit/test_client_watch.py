"""A watch goes on after whatever ends its stream: no event is left out, none comes twice, and it ends with the job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.client import (
    AsyncTandemClient,
    Checkpoint,
    CheckpointSaved,
    Event,
    JobState,
    Log,
    Metrics,
    Samples,
    StateChange,
    TandemClient,
)
from tandem.client._aio import job as aio_job
from tandem.client._sync import job as sync_job
from tandem.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    TandemError,
    Unavailable,
)
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tests.scripted import GONE, Script, line, served, state


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def address(script: Script, socket_folder: Path) -> Iterator[str]:
    with served(script, socket_folder) as address:
        yield address


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (aio_job, sync_job):
        monkeypatch.setattr(module, "_AWAY_S", 0.01)
        monkeypatch.setattr(module, "_AGAIN_S", 0.01)


@pytest.fixture(params=["sync", "aio"])
def watch(request: pytest.FixtureRequest, address: str) -> Callable[..., list[Event]]:
    """All events of job j1, by either client."""

    def threads(patience_s: float = 5.0, **arguments: Any) -> list[Event]:
        with TandemClient(trainer=address, patience_s=patience_s) as client:
            return list(client.job("j1").watch(**arguments))

    def loop(patience_s: float = 5.0, **arguments: Any) -> list[Event]:
        async def collect() -> list[Event]:
            async with AsyncTandemClient(trainer=address, patience_s=patience_s) as client:
                return [event async for event in (await client.job("j1")).watch(**arguments)]

        return asyncio.run(collect())

    return threads if request.param == "sync" else loop


def sequences(events: list[Event]) -> list[int]:
    return [event.sequence for event in events]


def test_events_come_typed_and_the_watch_ends_with_the_job(
    script: Script, watch: Callable[..., list[Event]]
) -> None:
    def all_kinds(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        metrics = job_pb2.StepMetrics(step=1, max_steps=2, epoch=0.5, values={"reward": 0.25})
        sample = job_pb2.RolloutSample(prompt="p", completion="c", rewards={"r": 1.0}, weight_version=3)
        saved = job_pb2.Checkpoint(step=2, path="/c", bytes=7)
        yield [state(1, "QUEUED"), line(2)]
        yield [
            job_pb2.JobEvent(sequence=3, metrics=metrics),
            job_pb2.JobEvent(sequence=4, samples=job_pb2.RolloutSamples(step=1, samples=[sample])),
            job_pb2.JobEvent(sequence=5, checkpoint=saved),
            job_pb2.JobEvent(sequence=6),  # of a newer service
        ]
        script.over("SUCCEEDED", 7)
        yield [state(7, "SUCCEEDED")]

    script.rounds = [all_kinds]
    events = watch()
    assert sequences(events) == [1, 2, 3, 4, 5, 6, 7]
    kinds = [StateChange, Log, Metrics, Samples, CheckpointSaved, Event, StateChange]
    assert [type(event) for event in events] == kinds
    first, text, figures, samples, saved, _, last = events
    assert isinstance(first, StateChange)
    assert (first.old_state, first.state) == (JobState.UNSPECIFIED, JobState.QUEUED)
    assert isinstance(text, Log)
    assert text.text == "line 2"
    assert isinstance(figures, Metrics)
    assert (figures.step, figures.max_steps, figures.values) == (1, 2, {"reward": 0.25})
    assert isinstance(samples, Samples)
    assert (samples.samples[0].rewards, samples.samples[0].advantage) == ({"r": 1.0}, None)
    assert isinstance(saved, CheckpointSaved)
    assert saved.checkpoint.path == "/c"
    assert isinstance(last, StateChange)
    assert last.state.is_over


def test_a_broken_stream_goes_on_after_the_last_event(
    script: Script, watch: Callable[..., list[Event]]
) -> None:
    def breaks(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        yield [line(1), line(2)]
        raise GONE

    def tells_again(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        script.over("FAILED", 4)
        yield [line(2), line(3)]
        yield [state(4, "FAILED")]

    script.rounds = [breaks, GONE, GONE, tells_again]
    assert sequences(watch()) == [1, 2, 3, 4]
    assert [request.after_sequence for request in script.asked] == [0, 2, 2, 2]


def test_a_stream_that_ends_in_order_with_a_job_that_goes_on_is_opened_again(
    script: Script, watch: Callable[..., list[Event]]
) -> None:
    """So it is when the service drains, even if the job ends meanwhile."""

    def drains(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        yield [line(5)]
        script.over("SUCCEEDED", 7)

    def rest(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        yield [line(6), state(7, "SUCCEEDED")]

    script.rounds = [lambda request: iter([]), drains, rest]
    assert sequences(watch(after=4)) == [5, 6, 7]
    assert [request.after_sequence for request in script.asked] == [4, 4, 5]


def test_some_kinds_alone_end_with_the_job_too(script: Script, watch: Callable[..., list[Event]]) -> None:
    """Their last sequence number is not the job's: a stream without events says that there are no more."""

    def states(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        script.over("CANCELLED", 9)
        yield [state(3, "CANCELLED")]

    script.rounds = [states, lambda request: iter([])]
    assert sequences(watch(kinds=[StateChange])) == [3]
    assert [list(request.kinds) for request in script.asked] == [[pb.EVENT_KIND_STATE]] * 2


def test_a_stream_at_its_own_deadline_is_opened_again(
    script: Script, watch: Callable[..., list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (aio_job, sync_job):
        monkeypatch.setattr(module, "_WATCH_S", 1.0)  # of which the first answer needs some
    stay = threading.Event()

    def silent(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        yield [line(1)]
        stay.wait(10)

    def ends(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        stay.set()
        script.over("SUCCEEDED", 2)
        yield [state(2, "SUCCEEDED")]

    script.rounds = [silent, ends]
    assert sequences(watch()) == [1, 2]


def test_a_service_that_stays_away_is_told_of(script: Script, watch: Callable[..., list[Event]]) -> None:
    script.rounds = [GONE] * 1000
    with pytest.raises(Unavailable, match="the connection broke"):
        watch(patience_s=1.0)
    assert len(script.asked) > 1


def test_a_watch_that_takes_too_long_gives_up(script: Script, watch: Callable[..., list[Event]]) -> None:
    script.rounds = [GONE] * 1000
    with pytest.raises(DeadlineExceeded, match=r"job j1 is not over after 0\.1 s"):
        watch(timeout_s=0.1)


def test_a_job_that_is_deleted_ends_the_watch_with_an_error(
    script: Script, watch: Callable[..., list[Event]]
) -> None:
    script.rounds = [GONE, NotFound(Reason.JOB_NOT_FOUND, "there is no job j1")]
    with pytest.raises(NotFound):
        watch()


def test_the_result_is_the_last_checkpoint(script: Script, address: str) -> None:
    def ends(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        script.over("SUCCEEDED", 4)
        yield [state(4, "SUCCEEDED")]

    script.job.last_sequence, script.rounds = 3, [GONE, ends, lambda request: iter([])]
    with TandemClient(trainer=address) as client:
        job = client.job("j1")
        assert job.result(10) is None
        script.checkpoints = [job_pb2.Checkpoint(step=n, path=f"/{n}") for n in (1, 2)]
        saved = job.result(10)
        assert job.state is JobState.SUCCEEDED
    assert isinstance(saved, Checkpoint)
    assert (saved.step, saved.path) == (2, "/2")
    states = [pb.EVENT_KIND_STATE]
    assert [(r.after_sequence, list(r.kinds)) for r in script.asked] == [
        (3, states),
        (3, states),
        (4, states),
    ]


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("FAILED", FailedPrecondition, Reason.JOB_FAILED),
        ("CANCELLED", Cancelled, Reason.JOB_CANCELLED),
    ],
)
def test_the_result_of_a_job_without_one_is_its_error(
    script: Script, address: str, name: str, error: type[TandemError], reason: Reason
) -> None:
    script.over(name, 3, "out of luck")
    script.rounds = [lambda request: iter([])]
    with TandemClient(trainer=address) as client, pytest.raises(error, match="out of luck") as caught:
        client.job("j1").result(10)
    assert caught.value.reason is reason
    assert caught.value.metadata == {"job_id": "j1", "state": name}


def test_a_submission_whose_answer_was_lost_makes_one_job(script: Script, address: str) -> None:
    script.refuse = [GONE, GONE]
    with TandemClient(trainer=address) as client:
        assert client.submit({"grpo": {}}).id == "j1"
    first, *others = script.created
    assert len(others) == 2
    assert first.request_id
    assert all(request == first for request in others)


def test_a_refusal_is_not_repeated(script: Script, address: str) -> None:
    script.refuse = [InvalidArgument(Reason.FIELD_INVALID, "job.model: is missing")]
    with TandemClient(trainer=address) as client, pytest.raises(InvalidArgument, match=r"job\.model"):
        client.submit({"grpo": {}})
    assert len(script.created) == 1


def test_pages_are_fetched_as_they_are_needed(address: str) -> None:
    with TandemClient(trainer=address) as client:
        assert [job.id for job in client.jobs(page_size=2)] == ["j0", "j1", "j2", "j3", "j4"]
        with pytest.raises(InvalidArgument, match="there is no state 'BUSY'; there are QUEUED"):
            list(client.jobs(states=["BUSY"]))


def test_nobody_there(socket_folder: Path) -> None:
    with TandemClient(trainer=f"unix://{socket_folder}/none.sock") as client, pytest.raises(Unavailable):
        client.job("j1")


def test_addresses_come_from_the_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_TRAINER_ADDRESS", address)
    with TandemClient() as client:
        assert client.job("j1").id == "j1"
