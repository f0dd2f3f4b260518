"""Jobs get their turn and their GPUs: so many at once, the oldest that fits first. What runs is no training here."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import InvalidArgument
from tests.jobs import spec
from trainer_service.jobs import attempts, gpus, processes
from trainer_service.jobs.attempts import Limits
from trainer_service.jobs.checker import Checker
from trainer_service.jobs.folder import JobFolder, Outcome
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.run import ENGINE_GPUS
from trainer_service.jobs.start import environment
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import Job, Store, open_store
from trainer_service.jobs.supervisor import Supervisor

Service = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store("", tmp_path)
    made.lock()
    yield made
    made.close()


@pytest.fixture
async def service(
    store: Store, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Service]:
    """Starts a supervisor, whose jobs sleep."""

    def sleep(folder: JobFolder, job: Job) -> Identity:
        own = os.environ | environment(folder, job)
        process = subprocess.Popen(["sleep", "600"], env=own, start_new_session=True)
        process.returncode = 0  # whoever follows it waits for it
        return Identity.of(process.pid)

    async def nothing(checker: Checker) -> None:
        """No job is checked."""

    monkeypatch.setattr(attempts, "spawn", sleep)
    monkeypatch.setattr(Checker, "start", nothing)

    @asynccontextmanager
    async def running(**limits: Any) -> AsyncIterator[Supervisor]:
        made = Supervisor(store, socket_folder, Limits(poll_s=0.02, retry_delay_s=0, **limits))
        await made.start()
        try:
            yield made
        finally:
            await made.stop()

    async with AsyncExitStack() as stack:
        yield lambda **limits: stack.enter_async_context(running(**limits))
    for path in socket_folder.iterdir():
        processes.kill(path, None)


async def until(condition: Callable[[], bool], what: str = "") -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)


def in_state(store: Store, state: JobState) -> list[str]:
    """The ids of the jobs in a state, the oldest first."""
    return [job.id for job in reversed(store.find(states=[state]))]


async def end(store: Store, root: Path, job_id: str, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    """Have a job's process end with an outcome."""
    await until(lambda: bool(store.get(job_id).process))  # which is known a moment after the start
    JobFolder(root / job_id).tell_outcome(store.get(job_id).attempt, outcome)
    found = Identity.parse(store.get(job_id).process)
    assert found is not None
    found.send(9)


def variables(job: Job) -> dict[str, str]:
    """The environment of a job's process."""
    found = Identity.parse(job.process)
    assert found is not None
    entries = Path(f"/proc/{found.pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


async def test_so_many_run_at_once_and_the_oldest_goes_first(
    store: Store, service: Service, socket_folder: Path
) -> None:
    for name in "abcd":
        store.create(name, spec())
    await service(max_running=2)
    await until(lambda: in_state(store, JobState.STARTING) == ["a", "b"])
    assert in_state(store, JobState.QUEUED) == ["c", "d"]
    await end(store, socket_folder, "b")
    await until(lambda: in_state(store, JobState.STARTING) == ["a", "c"])
    assert in_state(store, JobState.SUCCEEDED) == ["b"]
    assert in_state(store, JobState.QUEUED) == ["d"]
    await end(store, socket_folder, "a", Outcome.FAILED)
    await until(lambda: in_state(store, JobState.STARTING) == ["c", "d"])
    assert [job.attempt for job in store.find()] == [1, 1, 1, 1]


async def test_a_stop_that_comes_with_a_change_is_one(service: Service) -> None:
    """Of what waits for changes, nothing goes on."""
    made = await service(standby=0)
    for _ in range(3):
        await asyncio.sleep(0.05)  # it waits
    made._changed("any")
    await asyncio.sleep(0)  # it is woken, and has not run
    async with asyncio.timeout(20):
        await made.stop()
    assert all(task.done() for task in made._tasks)


async def test_gpus_are_given_out_whole_and_come_back(
    store: Store, service: Service, socket_folder: Path
) -> None:
    two: dict[str, Any] = {"hardware": {"gpus": 2}}
    apart: dict[str, Any] = {"inference": {"managed": {"gpus": 1}}, "hardware": {"gpus": 1}}
    store.create("two", spec(**two))
    store.create("apart", spec(**apart))
    store.create("one", spec())
    store.create("none", spec(hardware={"cpu": True}))
    await service(max_running=4, gpus=("0", "1", "7"))
    await until(lambda: in_state(store, JobState.STARTING) == ["two", "one", "none"])
    assert in_state(store, JobState.QUEUED) == ["apart"]  # it does not fit, and holds up nobody
    assert [store.get(name).gpus for name in ("two", "one", "none")] == [("0", "1"), ("7",), ()]
    await until(lambda: all(store.get(name).process for name in ("two", "one", "none")))
    assert variables(store.get("two"))["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert variables(store.get("none"))["CUDA_VISIBLE_DEVICES"] == ""
    await end(store, socket_folder, "two")
    await until(lambda: bool(store.get("apart").process))
    assert (store.get("apart").gpus, store.get("two").gpus) == (("0", "1"), ())
    own = variables(store.get("apart"))
    assert (own["CUDA_VISIBLE_DEVICES"], own[ENGINE_GPUS]) == ("0", "1")
    assert own[MARK] == str(socket_folder / "apart")


async def test_a_start_of_the_machine_resumes_all_and_is_no_retry(
    store: Store, service: Service, socket_folder: Path
) -> None:
    """Their processes are of another boot: an id that another process has by now is none of theirs."""
    before = f"{os.getpid()} 1 {'0' * 8}-1111-2222-3333-444444444444"
    for name in "abc":
        store.create(name, spec(max_retries=0))
        store.move(name, Move.START, attempt=1, process=before)
    store.move("b", Move.RUN)
    store.move("c", Move.CANCEL)
    await service(max_running=3)
    await until(lambda: in_state(store, JobState.STARTING) == ["a", "b"])
    await until(lambda: in_state(store, JobState.CANCELLED) == ["c"])
    await until(lambda: all(store.get(name).process not in ("", before) for name in "ab"))
    assert [(store.get(name).attempt, store.get(name).retries) for name in "ab"] == [(2, 0), (2, 0)]
    await end(store, socket_folder, "a", Outcome.DIED)  # of this boot, which counts
    await until(lambda: in_state(store, JobState.FAILED) == ["a"])


async def test_a_job_that_no_waiting_would_help_is_refused(service: Service) -> None:
    made = await service(gpus=("0", "1"))
    for fields, field in (
        ({"hardware": {"gpus": 3}}, "job.hardware.gpus"),
        ({"hardware": {"processes": 3}}, "job.hardware.processes"),
        ({"inference": {"managed": {"gpus": 2}}}, "job.inference.managed.gpus"),
    ):
        with pytest.raises(InvalidArgument, match="the job needs 3 GPUs, and the host has 2") as raised:
            await made.check(spec(**fields))
        assert [violation.field for violation in raised.value.violations] == [field]


def test_the_gpus_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5")
    assert gpus.found() == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.found() == []
