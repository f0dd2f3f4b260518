"""A trainer service as a real process, and jobs that stop where a test wants them to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from tandem.rpc import connect, translated
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.trainer.v1.trainer_pb2_grpc import TrainingJobServiceStub
from tests.services import ENGINE, ENVIRONMENT
from trainer_service.jobs import processes
from trainer_service.jobs.spec import ALGORITHMS

#: The reward of the jobs. Its n-th call waits while there is a file hold-n, and says so by one wait-n. It fails
#: on the rank that the file fails-on names.
REWARD = """
import os, pathlib, time

HERE = pathlib.Path(__file__).parent

def score(completion_ids, prompts, **_):
    fails_on = HERE / "fails-on"
    if fails_on.exists() and fails_on.read_text() == os.environ.get("RANK"):
        raise ValueError("no such reward")
    with (HERE / "calls").open("a") as calls:
        calls.write("x")
    n = len((HERE / "calls").read_text())
    end = time.monotonic() + 120
    while (HERE / f"hold-{n}").exists() and time.monotonic() < end:
        (HERE / f"wait-{n}").touch()
        time.sleep(0.02)
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]
"""


@dataclass
class Place:
    """A folder with what jobs are made of."""

    folder: Path
    model: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job_reward.py").write_text(REWARD)
        rows = [json.dumps({"prompt": text}) for text in ["ab", "cde", "x", "yy"] * 4]
        (self.folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")

    def hold(self, call: int) -> None:
        """Have the reward's n-th call, counted from the last `fresh`, wait."""
        (self.folder / f"hold-{call}").touch()

    def wait_until_held(self, *calls: int, seconds: float = 120) -> None:
        """Until one of these calls waits."""
        end = time.monotonic() + seconds
        while not any((self.folder / f"wait-{call}").exists() for call in calls):
            assert time.monotonic() < end, f"the reward's call {calls} never came"
            time.sleep(0.02)

    def let_go(self, call: int) -> None:
        (self.folder / f"hold-{call}").unlink()

    def fresh(self) -> None:
        """Forget all calls."""
        for pattern in ("hold-*", "wait-*", "calls", "fails-on"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def spec(self, address: str | None, steps: int = 2, **fields: Any) -> job_pb2.JobSpec:
        """A small job; with an inference service of its own if no `address` is given."""
        engine = {name: json.loads(value) for name, value in ENGINE.items()}
        target = {"managed": {"engine": engine}} if address is None else {"service": {"addresses": [address]}}
        training = {
            "max_steps": steps,
            "save_steps": 1,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
        }
        given = {
            "model": {"path": str(self.model)},
            "dataset": {"json_lines": str(self.folder / "prompts.jsonl")},
            "rewards": [{"function": "job_reward:score"}],
            "inference": target,
            "training": training,
        } | ({} if fields.keys() & set(ALGORITHMS) else {"grpo": {"num_generations": 4}})
        return json_format.ParseDict(given | fields, job_pb2.JobSpec())


@dataclass
class JobService:
    """A running trainer service."""

    process: subprocess.Popen[bytes]
    address: str
    root: Path
    log: Path
    channel: grpc.Channel

    @property
    def stub(self) -> TrainingJobServiceStub:
        return TrainingJobServiceStub(self.channel)

    def submit(self, spec: job_pb2.JobSpec, request_id: str = "") -> job_pb2.Job:
        request = pb.CreateJobRequest(job=spec, request_id=request_id)
        with translated():
            return self.stub.CreateJob(request, timeout=100).job

    def get(self, job_id: str) -> job_pb2.Job:
        with translated():
            return self.stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=20).job

    def watch(self, job_id: str, after: int = 0, seconds: float = 150) -> Iterator[job_pb2.JobEvent]:
        request = pb.WatchJobRequest(job_id=job_id, after_sequence=after)
        with translated():
            for response in self.stub.WatchJob(request, timeout=seconds):
                yield from response.events

    def wait_for(self, job_id: str, state: str, after: int = 0) -> list[job_pb2.JobEvent]:
        """The events after a sequence number up to the one that tells of a state."""
        seen = []
        for event in self.watch(job_id, after):
            seen.append(event)
            if event.HasField("state") and event.state.state == getattr(job_pb2, f"JOB_STATE_{state}"):
                return seen
        raise AssertionError(
            f"the job never became {state}: {[e for e in seen if not e.HasField('metrics')]}"
        )

    def members(self, job_id: str) -> set[int]:
        """The processes of a job."""
        return processes.members(self.root / "jobs" / job_id)

    def training(self, job_id: str) -> int:
        """The process that trains."""
        found = []
        for pid in self.members(job_id):
            with contextlib.suppress(FileNotFoundError):
                if b"trainer_service.jobs.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        assert len(found) == 1
        return found[0]

    def standbys(self) -> set[int]:
        """The processes that wait for a job."""
        mark = f"{processes.MARK}={self.root}/jobs/standby-".encode()
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.add(int(path.parent.name))
        return found

    def wait_for_standby(self, seconds: float = 120) -> set[int]:
        """The leader and the training of one that waits for a job."""
        end = time.monotonic() + seconds
        while len(found := self.standbys()) < 2:
            assert time.monotonic() < end, f"nobody stands by: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)
        return found

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


@contextlib.contextmanager
def job_service(folder: Path, place: Place, *flags: str) -> Iterator[JobService]:
    """A service with its jobs in `folder`. Whatever happens, no process of it or of its jobs is left."""
    address = f"unix://{folder}/trainer.sock"
    log = folder / "trainer.log"
    command = [sys.executable, "-m", "trainer_service", f"--folder={folder}", f"--addresses={address}"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, "--cancel-grace-s=20", "--retry-delay-s=0", *flags],
            stdout=out,
            stderr=out,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(place.folder)},
            start_new_session=True,
        )
    with connect(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(120)
            yield JobService(process, address, folder, log, channel)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def end_jobs(folder: Path) -> None:
    """Kill whatever a service that was killed has left."""
    for path in (folder / "jobs").glob("*"):
        processes.kill(path, None)
