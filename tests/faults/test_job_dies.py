"""A job outlives its service, and its own death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tests.job_service import Place, end_jobs, job_service
from tests.services import Service


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tdj") as made:
        yield Path(made)
        end_jobs(Path(made))


def test_kill_9_of_the_service_and_of_the_training(
    folder: Path, tmp_path: Path, checkpoints: dict[str, Path], llama: Service
) -> None:
    place = Place(tmp_path / "place", checkpoints["llama"])
    place.hold(2)
    place.hold(3)
    with job_service(folder, place) as first:
        job = first.submit(place.spec(llama.address, steps=3))
        seen = first.wait_for(job.id, "RUNNING")
        place.wait_until_held(2)
        training = first.training(job.id)
        first.kill()

    os.kill(training, 0)  # it knows nothing of it
    place.let_go(2)
    place.wait_until_held(3)  # and trains on, with nobody there
    with job_service(folder, place) as second:
        now = second.get(job.id)
        assert (now.state, now.attempt) == (job_pb2.JOB_STATE_RUNNING, 1)
        assert second.training(job.id) == training

        refused = subprocess.run(
            [
                sys.executable,
                "-m",
                "trainer_service",
                f"--folder={folder}",
                f"--addresses=unix://{folder}/o.sock",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert refused.returncode == 1
        assert f"STORE_IN_USE: another trainer service, process {second.process.pid}, holds" in refused.stderr

        os.kill(training, signal.SIGKILL)  # within the third step: its second checkpoint is complete
        seen += second.wait_for(job.id, "SUCCEEDED", after=seen[-1].sequence)
        now = second.get(job.id)
        found = second.stub.ListCheckpoints(pb.ListCheckpointsRequest(job_id=job.id), timeout=20).checkpoints
        assert second.members(job.id) == set()

    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    changes = [event.state for event in seen if event.HasField("state")]
    assert [job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in changes] == [
        *("QUEUED", "STARTING", "RUNNING"),
        *("RETRYING", "STARTING", "RUNNING", "SUCCEEDED"),
    ]
    assert changes[3].reason == "its training was killed by SIGKILL"
    steps = [(event.attempt, event.metrics.step) for event in seen if "reward" in event.metrics.values]
    assert steps == [(1, 1), (1, 2), (2, 3)]  # each once: the second attempt began where the first had saved
    assert (now.attempt, now.retries) == (2, 1)
    assert [one.step for one in found] == [1, 2, 3]


def test_kill_9_of_one_of_two_processes(
    folder: Path, tmp_path: Path, checkpoints: dict[str, Path], llama: Service
) -> None:
    """The other one, which waits for it in a collective, is not to blame."""
    place = Place(tmp_path / "place", checkpoints["llama"])
    for call in (3, 4):  # of the second step: which rank calls first is not said
        place.hold(call)
    with job_service(folder, place) as service:
        job = service.submit(place.spec(llama.address, steps=2, hardware={"processes": 2, "cpu": True}))
        place.wait_until_held(3, 4)
        marked = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in service.members(job.id)}
        (second,) = (pid for pid, environment in marked.items() if b"\0RANK=1\0" in environment)
        os.kill(second, signal.SIGKILL)
        for call in (3, 4):
            place.let_go(call)
        seen = service.wait_for(job.id, "SUCCEEDED")
        changes = [event.state for event in seen if event.HasField("state")]
        assert [job_pb2.JobState.Name(change.state).removeprefix("JOB_STATE_") for change in changes] == [
            *("QUEUED", "STARTING", "RUNNING"),
            *("RETRYING", "STARTING", "RUNNING", "SUCCEEDED"),
        ]
        assert service.get(job.id).retries == 1


def test_who_stands_by_ends_with_the_service(
    folder: Path, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    place = Place(tmp_path / "place", checkpoints["llama"])
    with job_service(folder, place) as first:
        first.wait_for_standby()
        first.kill()
        end = time.monotonic() + 120
        while first.standbys():  # it sees that, once it has loaded what it is loading
            assert time.monotonic() < end
            time.sleep(0.02)
    with job_service(folder, place) as second:
        second.wait_for_standby()
        second.process.terminate()
        assert second.process.wait(60) == 0
        assert second.standbys() == set()


def test_a_job_that_dies_too_often_fails(folder: Path, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Its process kills itself as soon as it imports the reward."""
    place = Place(tmp_path / "place", checkpoints["llama"])
    code = (
        "import os, sys\n"
        "if sys.argv[0].endswith('child.py'): os.kill(os.getpid(), 9)\n"  # not where the job is only checked
        "def score(**_): return []\n"
    )
    (place.folder / "job_reward.py").write_text(code)
    with job_service(folder, place) as service:
        job = service.submit(place.spec("unix:///nowhere.sock", max_retries=0))
        service.wait_for(job.id, "FAILED")
        now = service.get(job.id)
        assert (now.attempt, now.retries) == (1, 0)
        assert now.reason == "its training was killed by SIGKILL"
        assert service.members(job.id) == set()
