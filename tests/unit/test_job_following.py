"""A job is followed to its end, whatever the store refuses meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa

from tandem.errors import Reason, ResourceExhausted, TandemError, Unavailable
from tests.jobs import spec
from trainer_service.jobs import attempts as module
from trainer_service.jobs.attempts import Attempts, Limits
from trainer_service.jobs.folder import JobFolder, Outcome
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.sql import SqlStore
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import EventKind, Job, Store, open_store

UNREACHABLE = Unavailable(Reason.UNREACHABLE, "the store does not answer")
FULL = ResourceExhausted(Reason.DISK_FULL, "the disk of the store is full")


class Refusing:
    """A store that refuses what is in `refused`, and counts how often it did."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.refused: dict[str, Exception] = {}
        self.times: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if (error := self.refused.get(name)) is not None:
                self.times[name] += 1
                raise error
            return method(*args, **kwargs)

        return call


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Refusing]:
    made = open_store("", tmp_path)
    made.lock()
    yield Refusing(made)
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "jobs" / "job")
    made.make(spec())
    return made


@pytest.fixture
def process(folder: JobFolder) -> Iterator[subprocess.Popen[bytes]]:
    """Stands for a job's."""
    started = subprocess.Popen(
        ["sleep", "600"], env=os.environ | {MARK: str(folder.path)}, start_new_session=True
    )
    yield started
    started.kill()
    started.returncode = 0  # whoever followed it has waited for it


@pytest.fixture
async def attempts(
    store: Refusing, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Attempts]:
    monkeypatch.setattr(module, "_AGAIN_S", 0.02)
    made = Attempts(
        cast(Store, store), folder.path.parent, Limits(poll_s=0.02, retry_delay_s=0), lambda _: None
    )
    yield made
    await made.stop()


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def started(store: Refusing, process: subprocess.Popen[bytes]) -> Job:
    store.create("job", spec())
    made: Job = store.move("job", Move.START, attempt=1, process=str(Identity.of(process.pid)))
    return made


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("get", UNREACHABLE),
        ("get", OSError(5, "Input/output error")),
        ("get", KeyError("a bug")),
        ("append", FULL),
        ("append", TypeError("a bug")),
        ("move", FULL),
        ("move", UNREACHABLE),
        ("move", RuntimeError("a bug")),
    ],
)
async def test_a_store_that_refuses_for_a_while(
    attempts: Attempts,
    store: Refusing,
    folder: JobFolder,
    process: subprocess.Popen[bytes],
    method: str,
    error: Exception,
) -> None:
    attempts.follow(started(store, process))
    store.refused[method] = error
    folder.output_file.write_text("its last words\n")
    process.kill()
    await until(lambda: store.times[method] > 2)
    store.refused.clear()
    await until(lambda: store.get("job").state is JobState.RETRYING)
    assert [e.body["text"] for e in store.events("job", kinds=[EventKind.LOG])] == ["its last words"]
    assert store.get("job").retries == 1
    job = store.get("job")
    await until(lambda: attempts.due(job))  # nobody follows it any more: it may start again


async def test_a_job_whose_process_could_not_be_noted_is_followed(
    attempts: Attempts,
    store: Refusing,
    folder: JobFolder,
    process: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until it can be: a service that is killed meanwhile finds it by its mark."""
    identity = Identity.of(process.pid)
    monkeypatch.setattr(module, "spawn", lambda *_: identity)
    job = store.create("job", spec())
    store.refused["append"] = FULL
    await attempts.start(job, ())
    await until(lambda: store.times["append"] > 2)
    assert store.get("job").process == ""
    store.refused.clear()
    await until(lambda: store.get("job").process == str(identity))
    assert store.get("job").state is JobState.STARTING
    folder.tell_outcome(1, Outcome.SUCCEEDED)
    process.kill()
    await until(lambda: store.get("job").state is JobState.SUCCEEDED)


async def test_a_process_that_cannot_be_started_fails_the_job(
    attempts: Attempts, store: Refusing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(*_: object) -> Identity:
        store.refused["move"] = UNREACHABLE  # and the store cannot be told
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module, "spawn", spawn)
    await attempts.start(store.create("job", spec()), ())
    await until(lambda: store.times["move"] > 2)
    store.refused.clear()
    await until(lambda: store.get("job").state is JobState.FAILED)
    assert "its process cannot be started" in store.get("job").reason


async def test_a_job_that_was_deleted_is_followed_no_more(
    attempts: Attempts, store: Refusing, process: subprocess.Popen[bytes]
) -> None:
    job = started(store, process)
    attempts.follow(job)
    store.delete("job")
    await until(lambda: attempts.due(job))


async def test_a_cancelled_job_whose_process_is_not_known_yet(
    attempts: Attempts, store: Refusing, process: subprocess.Popen[bytes]
) -> None:
    """It is told to end once the store says which it is."""
    store.create("job", spec())
    store.move("job", Move.START, attempt=1)
    job = store.move("job", Move.CANCEL)
    store.refused["get"] = UNREACHABLE
    attempts.cancel(job)
    await until(lambda: store.times["get"] > 2)
    store.refused.clear()
    store.append("job", [], process=str(Identity.of(process.pid)))
    assert await asyncio.to_thread(process.wait, 60) == -15


def test_a_database_that_does_not_answer_is_told(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.db")
    store.lock()
    store.create("job", spec())

    @sa.event.listens_for(store._engine, "before_cursor_execute")
    def locked(*_: object) -> None:
        raise sa.exc.OperationalError("SELECT", {}, Exception("database is locked"))

    for call in (lambda: store.get("job"), lambda: store.move("job", Move.CANCEL), store.count):
        with pytest.raises(TandemError, match="database is locked") as raised:
            call()
        assert raised.value.reason is Reason.UNREACHABLE
    store.close()
