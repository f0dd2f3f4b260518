"""Real jobs of a real service, over a Unix socket: to their end, cancelled, resumed, deleted."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from tandem.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from tandem.rpc import translated
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.disks import fill, small_disk
from tests.job_service import JobService, Place, end_jobs, job_service
from tests.services import Service
from trainer_service.jobs.stopping import TOLD

WITH_DIGEST = weights_pb2.GetWeightVersionRequest(include_digest=True)


@pytest.fixture(scope="module")
def place(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("jobs"), checkpoints["llama"])


@pytest.fixture(scope="module")
def service(place: Place) -> Iterator[JobService]:
    with tempfile.TemporaryDirectory(prefix="tdj") as folder:
        with job_service(Path(folder), place) as running:
            yield running
        end_jobs(Path(folder))


@pytest.fixture(autouse=True)
def _fresh(place: Place) -> None:
    place.fresh()


def states(events: list[job_pb2.JobEvent]) -> list[str]:
    return [
        job_pb2.JobState.Name(event.state.state).removeprefix("JOB_STATE_")
        for event in events
        if event.HasField("state")
    ]


def test_a_job_to_its_end(service: JobService, place: Place, llama: Service) -> None:
    spec = place.spec(llama.address, labels={"kind": "whole"})
    job = service.submit(spec, "the same")
    assert service.submit(spec, "the same").id == job.id
    events = list(service.watch(job.id))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert states(events) == ["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"]

    metrics = [
        event.metrics for event in events if event.HasField("metrics") and "reward" in event.metrics.values
    ]
    assert [one.step for one in metrics] == [1, 2]
    assert all(one.max_steps == 2 and one.values["reward"] > 0 for one in metrics)
    samples = [event.samples for event in events if event.HasField("samples")]
    assert {sample.rewards["score"] > 0 for one in samples for sample in one.samples} == {True}
    versions = [{sample.weight_version for sample in one.samples} for one in samples]
    assert [len(found) for found in versions] == [1] * len(versions)
    assert max(versions[0]) < max(versions[1])

    now = service.get(job.id)
    assert (now.state, now.attempt, now.last_sequence) == (
        job_pb2.JOB_STATE_SUCCEEDED,
        1,
        events[-1].sequence,
    )
    assert (now.progress.step, now.progress.max_steps) == (2, 2)
    assert now.create_time.ToSeconds() <= now.start_time.ToSeconds() <= now.end_time.ToSeconds()
    found = service.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job.id), timeout=20).checkpoints
    assert [(one.step, Path(one.path).name) for one in found] == [(1, "checkpoint-1"), (2, "checkpoint-2")]
    assert all(one.bytes > 100_000 for one in found)
    told = [event.checkpoint.step for event in events if event.HasField("checkpoint")]
    assert told == [1, 2]

    middle = len(events) // 2
    assert list(service.watch(job.id, after=middle)) == events[middle:]
    listed = service.stub.ListJobs(pb.ListJobsRequest(labels={"kind": "whole"}), timeout=20)
    assert [one.id for one in listed.jobs] == [job.id]
    with pytest.raises(FailedPrecondition) as raised, translated():
        service.stub.ResumeJob(pb.ResumeJobRequest(job_id=job.id), timeout=20)
    assert raised.value.reason is Reason.JOB_STATE


def test_a_cancelled_job_saves_and_is_resumed(service: JobService, place: Place, llama: Service) -> None:
    place.hold(2)
    ready = service.wait_for_standby()
    job = service.submit(place.spec(llama.address, steps=3))
    place.wait_until_held(2)
    assert service.training(job.id) in ready  # it was there before the job
    assert not service.wait_for_standby() & ready  # and the next job has another one
    service.stub.CancelJob(pb.CancelJobRequest(job_id=job.id), timeout=20)
    again = service.stub.CancelJob(pb.CancelJobRequest(job_id=job.id), timeout=20).job
    assert again.state == job_pb2.JOB_STATE_CANCELLING
    next(e for e in service.watch(job.id) if e.log.text == TOLD.decode().rstrip())
    place.let_go(2)
    events = service.wait_for(job.id, "CANCELLED")
    assert states(events)[-2:] == ["CANCELLING", "CANCELLED"]
    assert service.members(job.id) == set()
    saved = service.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job.id), timeout=20).checkpoints
    assert [one.step for one in saved] == [1, 2]  # the step that it was in is done, and saved

    service.stub.ResumeJob(pb.ResumeJobRequest(job_id=job.id), timeout=20)
    rest = service.wait_for(job.id, "SUCCEEDED", after=events[-1].sequence)
    assert states(rest) == ["QUEUED", "STARTING", "RUNNING", "SUCCEEDED"]
    done = [event.metrics.step for event in rest if "reward" in event.metrics.values]
    assert done == [3]
    assert service.get(job.id).attempt == 2


def test_a_tracker_gets_the_figures_and_completions_are_logged(
    service: JobService, place: Place, llama: Service
) -> None:
    """By TRL's own means, which the job's settings reach."""
    pytest.importorskip("tensorboardX")
    training = {"max_steps": 2, "save_steps": 0, "per_device_train_batch_size": 8, "max_completion_length": 8}
    job = service.submit(
        place.spec(
            llama.address,
            training=training | {"report_to": ["tensorboard"]},
            grpo={"num_generations": 4, "trl_options": {"log_completions": True}},
        )
    )
    events = list(service.watch(job.id))
    assert states(events)[-1] == "SUCCEEDED"
    told = {event.metrics.step: event.metrics.values for event in events if "reward" in event.metrics.values}
    folder = Path(job.folder) / "checkpoints"
    (file,) = folder.rglob("events.out.tfevents.*")
    tracked = {step: value for name, step, value in scalars(file) if name == "train/reward"}
    assert tracked == pytest.approx({step: told[step]["reward"] for step in (1, 2)})
    printed = [event.log.text for event in events if "Completion" in event.log.text]
    assert len(printed) >= 2  # the heads of TRL's tables, one for each step
    for step in (1, 2):
        table = pandas.read_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
        assert list(table["step"]) == [step] * 8
        assert table["score"].mean() == pytest.approx(told[step]["reward"])
        sampled = [one for event in events if event.samples.step == step for one in event.samples.samples]
        assert [one.completion for one in sampled] == list(table["completion"])[:4]  # told of once


def test_a_dataset_that_gives_no_batch_is_no_success(
    service: JobService, place: Place, llama: Service, tmp_path: Path
) -> None:
    """How many prompts it has is known once it is loaded. transformers would end after no step, without an error."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    job = service.submit(place.spec(llama.address, dataset={"hub": {"path": str(tmp_path)}}))
    service.wait_for(job.id, "FAILED")
    said = "the dataset has too few prompts for a batch: 0 of 2 steps are done"
    assert service.get(job.id).reason == said

    (tmp_path / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')  # only the first row is read before
    job = service.submit(place.spec(llama.address, dataset={"json_lines": str(tmp_path / "half.jsonl")}))
    service.wait_for(job.id, "FAILED")
    assert "JSON parse error" in service.get(job.id).reason  # the cause, which the library keeps to itself

    few = {"json_lines": str(tmp_path / "train.jsonl")}
    with pytest.raises(InvalidArgument, match="has 1 prompts, and one generation takes 2") as raised:
        service.submit(place.spec(llama.address, dataset=few))
    assert [violation.field for violation in raised.value.violations] == ["job.dataset.json_lines"]


def scalars(file: Path) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of each figure in a file of TensorBoard's: records of a length, a sum, an event, a sum."""
    from tensorboardX.proto import event_pb2

    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value


def test_two_processes_save_together_and_fail_together(
    service: JobService, place: Place, llama: Service
) -> None:
    """Cancelled, they end after the same step. A reward that fails on one of them fails the job, with its reason."""
    for call in (3, 4):  # of the second step: which rank calls first is not said
        place.hold(call)
    spec = place.spec(llama.address, steps=4, hardware={"processes": 2, "cpu": True})
    job = service.submit(spec)
    place.wait_until_held(3, 4)
    service.stub.CancelJob(pb.CancelJobRequest(job_id=job.id), timeout=20)
    next(e for e in service.watch(job.id) if e.log.text == TOLD.decode().rstrip())
    for call in (3, 4):
        place.let_go(call)
    events = service.wait_for(job.id, "CANCELLED")
    assert service.members(job.id) == set()
    saved = service.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job.id), timeout=20).checkpoints
    assert [one.step for one in saved] == [1, 2]

    (place.folder / "fails-on").write_text("1")
    service.stub.ResumeJob(pb.ResumeJobRequest(job_id=job.id), timeout=20)
    rest = service.wait_for(job.id, "FAILED", after=events[-1].sequence)
    why = [event.state.reason for event in rest if event.HasField("state")]
    assert states(rest) == ["QUEUED", "STARTING", "RUNNING", "FAILED"], why
    assert service.get(job.id).reason.startswith("ValueError: no such reward")
    assert service.members(job.id) == set()


def test_a_full_disk_fails_a_job_which_goes_on_when_there_is_room(
    checkpoints: dict[str, Path], tmp_path: Path, llama: Service
) -> None:
    """The disk of the jobs' folders. That of the store has room."""
    place = Place(tmp_path / "place", checkpoints["llama"])
    place.hold(2)
    with tempfile.TemporaryDirectory(prefix="tdj") as folder:
        with small_disk(Path(folder) / "jobs", 64) as disk:
            with job_service(Path(folder), place, "--standby=0") as service:
                job = service.submit(place.spec(llama.address, steps=3))
                place.wait_until_held(2)  # the first step's checkpoint is complete
                assert service.standbys() == set()  # as it was told
                filler = fill(disk, 256 << 10)  # what is told of a step fits, and no checkpoint
                place.let_go(2)
                events = service.wait_for(job.id, "FAILED")
                assert service.get(job.id).reason.startswith(
                    "DISK_FULL: the disk of the job's folder is full"
                )
                assert service.members(job.id) == set()
                request = pb.ListCheckpointsRequest(job_id=job.id)
                assert [
                    one.step for one in service.stub.ListCheckpoints(request, timeout=20).checkpoints
                ] == [1]
                left = (disk / job.id / "checkpoints").glob("checkpoint-*")
                assert [path.name for path in left] == ["checkpoint-1"]

                fill(disk)  # not even a job's beginning fits
                service.stub.ResumeJob(pb.ResumeJobRequest(job_id=job.id), timeout=20)
                events = service.wait_for(job.id, "FAILED", after=events[-1].sequence)
                assert service.get(job.id).reason.startswith("DISK_FULL: ")

                filler.unlink()
                service.stub.ResumeJob(pb.ResumeJobRequest(job_id=job.id), timeout=20)
                service.wait_for(job.id, "SUCCEEDED", after=events[-1].sequence)
                found = service.stub.ListCheckpoints(request, timeout=20).checkpoints
                assert [one.step for one in found] == [1, 2, 3]
            end_jobs(Path(folder))


def test_a_job_may_train_an_adapter_beside_the_weights(
    service: JobService, place: Place, mixed: Service, checkpoints: dict[str, Path]
) -> None:
    mixed.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)
    before = mixed.weights.GetWeightVersion(WITH_DIGEST, timeout=30).digest
    lora = {"rank": 4, "target_modules": ["q_proj"], "mode": "adapter"}
    job = service.submit(place.spec(mixed.address, model={"path": str(checkpoints["llama"]), "lora": lora}))
    service.wait_for(job.id, "SUCCEEDED")
    assert mixed.weights.GetWeightVersion(WITH_DIGEST, timeout=30).digest == before
    (saved, *_) = service.stub.ListCheckpoints(
        pb.ListCheckpointsRequest(job_id=job.id), timeout=20
    ).checkpoints
    assert (Path(saved.path) / "adapter_model.safetensors").is_file()


def test_a_deleted_job_leaves_nothing(service: JobService, place: Place) -> None:
    """It has an inference service of its own, with a reference model beside, and is deleted while it trains."""
    place.hold(1)
    spec = place.spec(None)
    spec.xpo.SetInParent()
    job = service.submit(spec)
    place.wait_until_held(1, seconds=240)
    members = service.members(job.id)
    folder = Path(job.folder)
    assert len(members) >= 3  # what runs it, the training, the inference service
    assert (folder / "i.sock").is_socket()
    assert len([path for path in folder.iterdir() if path.is_socket()]) > 1  # vLLM's own, which it leaves
    service.stub.DeleteJob(pb.DeleteJobRequest(job_id=job.id), timeout=60)
    assert service.members(job.id) == set()
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists() and _runs(pid)]
    assert not folder.exists()
    for call in (service.get, lambda job_id: list(service.watch(job_id))):
        with pytest.raises(NotFound) as raised:
            call(job.id)
        assert raised.value.reason is Reason.JOB_NOT_FOUND


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"grpo": {"trl_options": {"lerning_rate": 1}}}, "job.grpo.trl_options.lerning_rate", "mean learning_rate"),
        ({"grpo": {"trl_options": {"log_completions": "perhaps"}}}, "job.grpo.trl_options.log_completions", "boolean"),
        ({"grpo": {"trl_options": {"output_dir": "/out"}}}, "job.grpo.trl_options.output_dir", "the service sets"),
        ({"grpo": {"num_generations": 3}}, "job.grpo.num_generations", "divisible"),
        ({"model": {"path": "/nowhere"}}, "job.model.path", "there is no folder /nowhere"),
        ({"dataset": {"json_lines": "/nowhere"}}, "job.dataset.json_lines", "No such file"),
        ({"dataset": {"reasoning_gym": {"task": "nonsense"}}}, "job.dataset.reasoning_gym", "not registered"),
        ({"rewards": [{"function": "job_reward:scroe"}]}, "job.rewards[0].function", "did you mean score"),
        ({"rewards": [{"function": "no_such_module:score"}]}, "job.rewards[0].function", "cannot import"),
        ({"hardware": {"gpus": 4096}}, "job.hardware.gpus", "the job needs 4096 GPUs"),
        ({"hardware": {"accelerate_config": "/nowhere"}}, "job.hardware.accelerate_config", "No such file"),
        ({"training": {"max_steps": 2, "top_p": 1.5}}, "job.training.top_p", "less than or equal to 1"),
        ({"training": {"max_steps": 2, "optim": "admaw"}}, "job.training.optim", "admaw is not a valid"),
        ({"training": {"max_steps": 2, "lr_scheduler_type": "cosin"}}, "job.training.lr_scheduler_type", "not a valid"),
        ({"training": {"max_steps": 2, "report_to": ["nonsense"]}}, "job.training.report_to[0]", "no tracker"),
        ({"xpo": {"loss_type": "sigmiod"}}, "job.xpo.loss_type", "must be one of sigmoid, ipo"),
    ],
)  # fmt: skip  # a table
def test_what_is_wrong_is_told_at_submission(
    service: JobService, place: Place, fields: dict[str, Any], field: str, said: str
) -> None:
    before = len(service.stub.ListJobs(pb.ListJobsRequest(), timeout=20).jobs)
    with pytest.raises(InvalidArgument, match=said) as raised:
        service.submit(place.spec("unix:///nowhere.sock", **fields))
    assert [violation.field for violation in raised.value.violations] == [field]
    assert len(service.stub.ListJobs(pb.ListJobsRequest(), timeout=20).jobs) == before


def test_a_dtype_that_torch_has_not(service: JobService, place: Place) -> None:
    model = {"path": str(place.model), "dtype": "float17"}
    with pytest.raises(InvalidArgument, match="no floating-point dtype 'float17'") as raised:
        service.submit(place.spec("unix:///nowhere.sock", model=model))
    assert [violation.field for violation in raised.value.violations] == ["job.model.dtype"]


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
