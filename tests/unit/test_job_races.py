"""What comes at the worst moment: calls, ends and lost answers in the midst of what is done to a job."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tandem.errors import NotFound, Reason, ResourceExhausted, Unavailable
from tests.jobs import spec
from trainer_service.jobs import attempts as module
from trainer_service.jobs import processes
from trainer_service.jobs.attempts import Attempts, Limits
from trainer_service.jobs.feed import Feed
from trainer_service.jobs.folder import EventLog, JobFolder, Outcome
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.standby import Waiting
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import EventKind, Job, Store, open_store
from trainer_service.jobs.supervisor import Supervisor

UNREACHABLE = Unavailable(Reason.UNREACHABLE, "the store does not answer")
FULL = ResourceExhausted(Reason.DISK_FULL, "the disk of the store is full")
Hook = Callable[..., None]


class Interrupted:
    """A store in whose calls something else happens: before they begin, or once they are done."""

    def __init__(self, store: Store) -> None:
        self.plain = store
        self.before: dict[object, Hook] = {}
        self.after: dict[object, Hook] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.plain, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            key: object = (name, args[1]) if name == "move" else name
            self.before.get(key, _nothing)()
            found = method(*args, **kwargs)
            self.after.get(key, _nothing)()
            return found

        return call


def _nothing() -> None:
    """Happens."""


def once(hooks: dict[object, Hook], key: object, error: Exception) -> None:
    """Have a call fail once."""

    def fail() -> None:
        del hooks[key]
        raise error

    hooks[key] = fail


class Held:
    """Holds up the threads that call it, until it lets go."""

    def __init__(self) -> None:
        self._there, self._go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._there.set()
        self._go.wait(30)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._there.wait, 30)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Interrupted]:
    made = open_store("", tmp_path)
    made.lock()
    yield Interrupted(made)
    made.close()


@pytest.fixture
def folder(socket_folder: Path) -> Iterator[JobFolder]:
    made = JobFolder(socket_folder / "job")
    made.make(spec())
    yield made
    processes.kill(made.path, None)


@pytest.fixture
async def service(
    store: Interrupted, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Supervisor]:
    """One that starts nothing by itself."""
    monkeypatch.setattr(module, "_AGAIN_S", 0.02)
    limits = Limits(poll_s=0.02, retry_delay_s=30, cancel_grace_s=0.3)
    made = Supervisor(cast(Store, store), socket_folder, limits)
    yield made
    await made.stop()


@pytest.fixture
def attempts(service: Supervisor) -> Attempts:
    return service._attempts


def sleeper(folder: JobFolder) -> Identity:
    """Stands for a job's process."""
    own = os.environ | {MARK: str(folder.path)}
    process = subprocess.Popen(["sleep", "600"], env=own, start_new_session=True)
    process.returncode = 0  # whoever follows it waits for it
    return Identity.of(process.pid)


def started(store: Interrupted, process: Identity | None) -> Job:
    store.create("job", spec())
    made: Job = store.move("job", Move.START, attempt=1, process=str(process or ""))
    return made


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_a_store_that_is_full_as_the_first_step_begins(
    attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    """It has that the job runs, and not its events: they come once there is room."""
    process = sleeper(folder)
    once(store.before, "append", FULL)
    EventLog(folder, 1).write("RUN", {"step": 0, "max_steps": 9})
    attempts.follow(started(store, process))
    await until(lambda: store.get("job").max_steps == 9)
    folder.tell_outcome(1, Outcome.SUCCEEDED)
    process.send(signal.SIGKILL)
    await until(lambda: store.get("job").state is JobState.SUCCEEDED)


async def test_cancelled_as_the_first_step_begins(
    service: Supervisor, attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    store.before["move", Move.RUN] = running = Held()
    EventLog(folder, 1).write("RUN", {"step": 0, "max_steps": 9})
    attempts.follow(started(store, sleeper(folder)))
    await running.reached()
    await service.cancel("job")
    running.let_go()
    await until(lambda: store.get("job").state is JobState.CANCELLED)


@pytest.mark.parametrize("boot", ["this", "an earlier"])
async def test_an_id_that_another_child_of_the_service_has_by_now(
    attempts: Attempts, store: Interrupted, folder: JobFolder, boot: str
) -> None:
    child = sleeper(JobFolder(Path("/another")))
    old = Identity(child.pid, child.started - 1000, child.boot if boot == "this" else "another")
    try:
        attempts.follow(started(store, old))
        await until(lambda: store.get("job").state is JobState.RETRYING)
        assert child.alive
    finally:
        child.send(signal.SIGKILL)


@pytest.mark.parametrize("call", ["cancel", "delete"])
async def test_a_caller_that_does_not_wait(
    service: Supervisor, attempts: Attempts, store: Interrupted, folder: JobFolder, call: str
) -> None:
    attempts.follow(started(store, sleeper(folder)))
    store.before["move", Move.CANCEL] = store.before["move", Move.DELETE] = moving = Held()
    task = asyncio.create_task(getattr(service, call)("job"))
    await moving.reached()
    task.cancel()  # as a server does whose client's time is over
    await asyncio.gather(task, return_exceptions=True)
    moving.let_go()
    await until(
        lambda: not store.find() if call == "delete" else not store.find(states=[JobState.CANCELLING])
    )
    await until(lambda: not processes.members(folder.path))


async def test_a_retry_of_which_nothing_was_heard(
    attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    process = sleeper(folder)
    once(store.after, ("move", Move.RETRY), UNREACHABLE)
    attempts.follow(started(store, process))
    process.send(signal.SIGKILL)
    await until(lambda: store.get("job").state is JobState.RETRYING)
    await until(lambda: attempts.due(store.get("job")))  # nobody follows it any more


@pytest.mark.parametrize("waited", [True, False])
async def test_a_start_of_which_nothing_was_heard(
    attempts: Attempts, store: Interrupted, folder: JobFolder, monkeypatch: pytest.MonkeyPatch, waited: bool
) -> None:
    """It is followed, and no try is used up: nothing ran."""
    reading, writing = os.pipe()
    ready = Waiting(sleeper(folder), writing, folder.path) if waited else None
    monkeypatch.setattr(attempts.standbys, "take", lambda: ready)
    once(store.after, ("move", Move.START), UNREACHABLE)
    with pytest.raises(Unavailable):
        await attempts.start(store.create("job", spec()), ())
    await until(lambda: store.get("job").state is JobState.RETRYING)
    assert (store.get("job").attempt, store.get("job").retries) == (1, 0)
    os.close(reading)
    if not waited:
        os.close(writing)


async def test_events_come_once_where_the_answer_was_lost(
    attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    process = sleeper(folder)
    folder.output_file.write_text("one line\n")
    once(store.after, "append", UNREACHABLE)
    attempts.follow(started(store, process))
    await until(lambda: not store.after)
    process.send(signal.SIGKILL)
    await until(lambda: store.get("job").state is JobState.RETRYING)
    assert [event.body["text"] for event in store.events("job", kinds=[EventKind.LOG])] == ["one line"]


async def test_an_outcome_that_cannot_be_read_for_a_while(
    attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    process = sleeper(folder)
    unreadable = folder.path / "outcome-1.json"
    unreadable.mkdir()
    attempts.follow(started(store, process))
    process.send(signal.SIGKILL)
    await until(lambda: not Path(f"/proc/{process.pid}").exists())
    await asyncio.sleep(0.1)
    assert store.get("job").state is JobState.STARTING
    unreadable.rmdir()
    folder.tell_outcome(1, Outcome.SUCCEEDED)
    await until(lambda: store.get("job").state is JobState.SUCCEEDED)


async def test_a_late_cancel_does_not_end_what_was_resumed(
    service: Supervisor, attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    first = sleeper(folder)
    attempts.follow(started(store, first))
    store.after["move", Move.CANCEL] = moved = Held()
    cancelling = asyncio.create_task(service.cancel("job"))
    await moved.reached()
    first.send(signal.SIGKILL)  # it ends by itself
    await until(lambda: store.get("job").state is JobState.CANCELLED and attempts.due(store.get("job")))
    await service.resume("job")
    second = sleeper(folder)
    attempts.follow(store.move("job", Move.START, attempt=2, process=str(second)))
    moved.let_go()
    await cancelling
    await asyncio.sleep(0.6)  # twice the time that it has
    assert store.get("job").state is JobState.STARTING
    assert second.alive


async def test_cancelled_while_another_process_is_started_in_its_place(
    store: Interrupted, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that waited for a job ends as it gets one."""
    limits = Limits(poll_s=0.02, cancel_grace_s=30)
    attempts = Attempts(cast(Store, store), folder.path.parent, limits, lambda _: None)
    gone = sleeper(folder)
    gone.send(signal.SIGKILL)
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(attempts.standbys, "take", lambda: Waiting(gone, writing, folder.path))
    spawning = Held()

    def spawn(folder: JobFolder, job: Job) -> Identity:
        spawning()
        return sleeper(folder)

    monkeypatch.setattr(module, "spawn", spawn)
    starting = asyncio.create_task(attempts.start(store.create("job", spec()), ()))
    await spawning.reached()
    attempts.cancel(store.move("job", Move.CANCEL, "cancelled"))
    await asyncio.sleep(0.1)
    spawning.let_go()
    await starting
    await until(lambda: store.get("job").state is JobState.CANCELLED)  # long before it would be killed
    await attempts.stop()


async def test_what_does_not_end_in_time_is_killed(
    service: Supervisor, attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    process = sleeper(folder)
    process.send(signal.SIGSTOP)
    attempts.follow(started(store, process))
    await service.cancel("job")
    await until(lambda: store.get("job").state is JobState.CANCELLED)
    assert not attempts._cancelling


async def start_and_delete(service: Supervisor, attempts: Attempts, store: Interrupted, at: Held) -> None:
    """Start a job that comes to `at`, and delete it there."""
    starting = asyncio.create_task(attempts.start(store.create("job", spec()), ()))
    await at.reached()
    deleting = asyncio.create_task(service.delete("job"))
    await asyncio.wait([deleting], timeout=0.3)
    at.let_go()
    await asyncio.gather(starting, deleting, return_exceptions=True)


async def test_deleted_while_its_folder_is_made(
    service: Supervisor,
    attempts: Attempts,
    store: Interrupted,
    folder: JobFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    making, make = Held(), JobFolder.make

    def made(folder: JobFolder, given: JobSpec) -> None:
        making()
        make(folder, given)

    monkeypatch.setattr(JobFolder, "make", made)
    await start_and_delete(service, attempts, store, making)
    assert store.find() == []
    assert not folder.path.exists()


async def test_deleted_while_its_process_is_started(
    service: Supervisor, attempts: Attempts, store: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawning, born = Held(), []

    def spawn(folder: JobFolder, job: Job) -> Identity:
        spawning()
        born.append(sleeper(folder))
        return born[0]

    monkeypatch.setattr(module, "spawn", spawn)
    await start_and_delete(service, attempts, store, spawning)
    try:
        assert store.find() == []
        assert not born[0].alive
    finally:
        born[0].send(signal.SIGKILL)


async def test_deleted_before_it_is_started(
    attempts: Attempts, store: Interrupted, socket_folder: Path
) -> None:
    job = store.create("job", spec())
    store.delete("job")
    with pytest.raises(NotFound):
        await attempts.start(job, ())
    assert not (socket_folder / "job").exists()


async def test_what_is_resumed_does_not_wait_for_an_earlier_retry(
    service: Supervisor, attempts: Attempts, store: Interrupted, folder: JobFolder
) -> None:
    process = sleeper(folder)
    attempts.follow(started(store, process))
    process.send(signal.SIGKILL)
    await until(lambda: store.get("job").state is JobState.RETRYING and not attempts._following)
    assert not attempts.due(store.get("job"))
    await service.cancel("job")
    assert attempts.due(await service.resume("job"))


async def test_an_end_and_its_time_are_one(service: Supervisor, store: Interrupted) -> None:
    """A service that is killed, or a job that is resumed, has no chance in between."""
    store.create("job", spec())
    once(store.before, "append", UNREACHABLE)
    assert (await service.cancel("job")).end_time is not None
    assert (await service.resume("job")).end_time is None


async def test_watching_what_is_not_there_keeps_nothing(store: Interrupted) -> None:
    feed = Feed(cast(Store, store))
    with pytest.raises(NotFound):
        await anext(feed.watch("nothing"))
    assert feed._changed == {}
