"""The store: what it returned from is there, what it refused left nothing, and one service has it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tandem.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from tests.disks import fill, small_disk
from tests.jobs import spec
from tests.postgres import empty, end_connections, postgres
from trainer_service.jobs import sql, tables
from trainer_service.jobs.sql import SqlStore
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import Event, EventKind, Offsets, Store, open_store


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database; empty for a file of the test's own."""
    if request.param == "sqlite":
        yield ""
        return
    with postgres() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    if server:
        empty(server)
    return server


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    made = open_store(url, tmp_path)
    made.lock()
    yield made
    made.close()


def log(text: str) -> Event:
    return Event(EventKind.LOG, 1.5, 1, {"text": text})


def test_a_job_is_kept(store: Store, url: str, tmp_path: Path) -> None:
    made = store.create("job-1", spec(labels={"a": "b"}), "request")
    assert (made.state, made.attempt, made.last_sequence) == (JobState.QUEUED, 0, 1)
    assert made.spec == spec(labels={"a": "b"})
    store.close()
    again = open_store(url, tmp_path)
    again.lock()
    assert again.get("job-1") == made
    assert [event.body for event in again.events("job-1")] == [{"state": "QUEUED", "reason": ""}]
    again.close()


def test_a_request_makes_one_job(store: Store) -> None:
    made = store.create("job-1", spec(), "request")
    assert store.create("job-2", spec(), "request") == made
    assert [job.id for job in store.find()] == ["job-1"]
    with pytest.raises(InvalidArgument, match="request_id") as raised:
        store.create("job-3", spec(max_retries=1), "request")
    assert raised.value.violations[0].field == "request_id"
    assert store.create("job-4", spec()).id == "job-4"
    assert store.create("job-5", spec()).id == "job-5"


def test_a_request_made_at_once_many_times_makes_one_job(store: Store) -> None:
    found: list[str] = []
    begin = threading.Barrier(8)

    def create(number: int) -> None:
        begin.wait(60)
        found.append(store.create(f"job-{number}", spec(labels={"a": "b"}), "request").id)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(store.find()) == 1


def test_events_are_numbered_without_gaps_by_many_at_once(store: Store) -> None:
    store.create("job-1", spec())

    def append() -> None:
        for _ in range(10):
            store.append("job-1", [log("a"), log("b")])

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [event.sequence for event in store.events("job-1")] == list(range(1, 82))


def test_a_reason_may_have_anything_in_it(store: Store) -> None:
    """It is what a library raised."""
    store.create("job-1", spec())
    store.append("job-1", [log("a\0b \udc80")])
    moved = store.move("job-1", Move.FAIL, "a\0b \udc80 \N{SNOWMAN}")
    assert moved.state is JobState.FAILED
    assert moved.reason == "a?b ? \N{SNOWMAN}"


def test_a_move_is_an_event(store: Store) -> None:
    store.create("job-1", spec())
    moved = store.move("job-1", Move.START, "its turn", attempt=1, gpus=("0",), process="1 2 boot")
    assert (moved.state, moved.reason, moved.attempt, moved.gpus) == (
        JobState.STARTING,
        "its turn",
        1,
        ("0",),
    )
    event = store.events("job-1", after=1)[0]
    assert (event.sequence, event.kind, event.attempt) == (2, EventKind.STATE, 1)
    assert event.body == {"old_state": "QUEUED", "state": "STARTING", "reason": "its turn"}


def test_an_end_has_its_time(store: Store) -> None:
    store.create("a", spec())
    end = store.move("a", Move.CANCEL)
    assert end.end_time is not None
    assert store.move("a", Move.CANCEL) == end
    assert store.move("a", Move.RESUME, end_time=None).end_time is None


def test_an_illegal_move_changes_nothing(store: Store) -> None:
    before = store.create("job-1", spec())
    with pytest.raises(FailedPrecondition) as raised:
        store.move("job-1", Move.RESUME, attempt=7)
    assert raised.value.reason is Reason.JOB_STATE
    assert store.get("job-1") == before
    assert len(store.events("job-1")) == 1


def test_a_move_that_leads_nowhere_tells_nothing(store: Store) -> None:
    store.create("job-1", spec())
    store.move("job-1", Move.CANCEL)
    assert store.move("job-1", Move.CANCEL).last_sequence == 2


def test_events_are_numbered_without_gaps_and_kept_with_how_far_was_read(store: Store) -> None:
    store.create("job-1", spec())
    store.create("job-2", spec())
    for index in range(5):
        offsets = Offsets(index, 2 * index, 3 * index)
        job = store.append("job-1", [log(f"a{index}"), log(f"b{index}")], offsets=offsets, step=index)
        store.append("job-2", [log("other")])
    assert (job.last_sequence, job.step, job.offsets) == (11, 4, Offsets(4, 8, 12))
    found = store.events("job-1")
    assert [event.sequence for event in found] == list(range(1, 12))
    assert [event.body["text"] for event in found[1:5]] == ["a0", "b0", "a1", "b1"]
    assert [event.sequence for event in store.events("job-1", after=4, limit=3)] == [5, 6, 7]
    assert [event.sequence for event in store.events("job-1", kinds=[EventKind.STATE])] == [1]


def test_pages_and_filters(store: Store) -> None:
    for index in range(7):
        store.create(f"job-{index}", spec(labels={"parity": str(index % 2), "all": "yes"}))
    store.move("job-5", Move.CANCEL)
    assert [job.id for job in store.find(limit=3)] == ["job-6", "job-5", "job-4"]
    before = store.find(limit=3)[-1].number
    assert [job.id for job in store.find(limit=3, before=before)] == ["job-3", "job-2", "job-1"]
    assert [job.id for job in store.find(states=[JobState.CANCELLED])] == ["job-5"]
    assert [job.id for job in store.find(labels={"parity": "1", "all": "yes"})] == ["job-5", "job-3", "job-1"]
    assert [job.id for job in store.find(labels={"parity": "1"}, states=[JobState.QUEUED])] == [
        "job-3",
        "job-1",
    ]
    assert store.find(labels={"parity": "yes"}) == []


def test_what_was_read_before_is_as_it_is_now(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs are kept as they were read, some of them: what another one has written shows all the same."""
    monkeypatch.setattr(sql, "_KEPT", 4)
    monkeypatch.setattr(sql, "_AT_ONCE", 2)
    writer = open_store(url, tmp_path)  # it has no lock, which the database does not mind
    for index in range(7):
        writer.create(f"job-{index}", spec(labels={"index": str(index)}))
    for _ in range(2):
        assert [job.spec.labels["index"] for job in store.find()] == list("6543210")
        assert [job.spec.labels["index"] for job in store.find(limit=3)] == list("654")
    offsets = Offsets(1, 2, 3)
    writer.append("job-6", [], gpus=("1", "0"), offsets=offsets, end_time=2.5)
    assert store.find(limit=1) == [store.get("job-6")] == [writer.get("job-6")]
    assert (store.get("job-6").gpus, store.get("job-6").offsets) == (("1", "0"), offsets)
    writer.append("job-6", [], gpus=(), end_time=None)
    assert (store.get("job-6").gpus, store.get("job-6").end_time) == ((), None)
    writer.delete("job-6")
    assert store.find(limit=1)[0].id == "job-5"
    with pytest.raises(NotFound):
        store.get("job-6")
    writer.close()


def test_jobs_are_counted_by_state(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.create(name, spec())
    store.move("b", Move.CANCEL)
    store.delete("c")
    expected = dict.fromkeys(JobState, 0) | {JobState.QUEUED: 1, JobState.CANCELLED: 1}
    assert store.count() == expected


def test_a_deleted_job_is_gone_and_its_number_too(store: Store) -> None:
    first = store.create("job-1", spec(labels={"a": "b"}), "request")
    store.append("job-1", [log("x")])
    store.delete("job-1")
    for call in (store.get, store.delete):
        with pytest.raises(NotFound) as raised:
            call("job-1")
        assert raised.value.reason is Reason.JOB_NOT_FOUND
    assert store.events("job-1") == []
    assert store.find() == []
    assert store.create("job-1", spec(), "request").number > first.number
    assert len(store.events("job-1")) == 1


def test_a_second_service_is_refused_until_the_first_is_killed(url: str, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from trainer_service.jobs.store import open_store\n"
        "store = open_store(sys.argv[2], Path(sys.argv[1])); store.lock(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), url]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        second = open_store(url, tmp_path)
        said = "another trainer service runs on this store" if url else f"process {holder.pid}, holds"
        with pytest.raises(FailedPrecondition, match=said) as raised:
            second.lock()
        assert raised.value.reason is Reason.STORE_IN_USE
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        end = time.monotonic() + 60
        while True:
            try:
                second.lock()
                break
            except FailedPrecondition:  # a server takes a moment to see that
                assert url
                assert time.monotonic() < end
                time.sleep(0.02)
        second.close()
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()  # type: ignore[union-attr]


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    """SQLite itself refuses to grow the file, with the error that it has for a full disk."""
    store = SqlStore(f"sqlite:///{tmp_path}/jobs.db")
    store.lock()
    store.create("job-1", spec())
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    @sa.event.listens_for(store._engine, "checkout")
    def limit(connection: object, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages + 4}")  # type: ignore[attr-defined]

    kept = 0
    with pytest.raises(ResourceExhausted) as raised:  # noqa: PT012  # it fits a few times
        for _ in range(1000):
            kept = store.append("job-1", [log("x" * 1000)]).last_sequence
    assert raised.value.reason is Reason.DISK_FULL
    assert kept > 1
    assert store.get("job-1").last_sequence == kept
    assert [event.sequence for event in store.events("job-1")] == list(range(1, kept + 1))
    with pytest.raises(ResourceExhausted):
        store.create("job-2", spec(labels={"much": "y" * 100_000}))
    assert [job.id for job in store.find()] == ["job-1"]
    store.close()


def test_a_store_on_a_full_disk_is_told(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        filler = fill(disk)
        for _ in range(2):  # the first one left nothing that holds the lock
            with pytest.raises(ResourceExhausted) as raised:
                open_store("", disk).lock()
            assert raised.value.reason is Reason.DISK_FULL
        filler.unlink()
        store = open_store("", disk)
        store.lock()
        assert store.create("job-1", spec()).number == 1
        store.close()


def test_the_steps_lead_to_the_tables(store: Store) -> None:
    """A column that is in `tables` and in no step would be missing in every store."""
    assert isinstance(store, SqlStore)
    found = sa.inspect(store._engine)
    for table in tables.metadata.sorted_tables:
        columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
        assert columns == {column.name: column.nullable for column in table.columns}
        indexes = {
            index["name"]
            for index in found.get_indexes(table.name)
            if "duplicates_constraint" not in index  # PostgreSQL's, of a column that is unique
        }
        assert indexes == {index.name for index in table.indexes}


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "nosuch://x/y",
        "sqlite:////nowhere/at/all/jobs.db",
        "postgresql+psycopg://nobody@127.0.0.1:1/jobs",  # whose driver says so in several lines
    ],
)
def test_a_store_that_cannot_be_is_told(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as raised:
        open_store(url, tmp_path).lock()
    assert [violation.field for violation in raised.value.violations] == ["store"]
    assert "\n" not in raised.value.message


def test_a_lock_that_the_server_forgot_is_taken_again_or_told(tmp_path: Path) -> None:
    with postgres() as url:
        first, second = open_store(url, tmp_path), open_store(url, tmp_path)
        first.lock()
        first.create("job-1", spec())
        end_connections(url)
        assert first.move("job-1", Move.CANCEL).state is JobState.CANCELLED
        with pytest.raises(FailedPrecondition):
            second.lock()
        end_connections(url)
        second.lock()  # quicker than the first
        for _ in range(2):
            with pytest.raises(FailedPrecondition) as raised:
                first.move("job-1", Move.RESUME)
            assert raised.value.reason is Reason.STORE_IN_USE
        assert second.get("job-1").state is JobState.CANCELLED
        second.close()
        assert first.move("job-1", Move.RESUME).state is JobState.QUEUED
        first.close()


def test_a_server_that_goes_away_is_told(tmp_path: Path) -> None:
    with postgres() as url:
        store = open_store(url, tmp_path)
        store.lock()
        store.create("job-1", spec())
        pid = int((Path(url.rpartition("=")[2]) / "data" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)
        end = time.monotonic() + 60
        with pytest.raises(Unavailable) as raised:  # noqa: PT012  # it takes a moment to go
            while time.monotonic() < end:
                store.get("job-1")
        assert raised.value.reason is Reason.UNREACHABLE
        store.close()
