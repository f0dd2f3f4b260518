"""What a job's processes write is read once and whole, whoever is killed in the middle."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.rpc.address import MAX_UNIX_PATH_BYTES
from tests.disks import fill, small_disk
from tests.jobs import spec
from trainer_service.jobs import processes
from trainer_service.jobs.folder import FULL, EventLog, JobFolder, Outcome, is_full, read_lines
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import EventKind, Store, open_store
from trainer_service.jobs.tail import ingest


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "job")
    made.make(spec())
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store("", tmp_path)
    made.lock()
    made.create("job", spec())
    made.move("job", Move.START, attempt=1)
    yield made
    made.close()


def metrics(step: int) -> dict[str, object]:
    return {"step": step, "max_steps": 9, "epoch": 0.5, "values": {"reward": 1.0}}


def texts(store: Store) -> list[str]:
    return [event.body["text"] for event in store.events("job", kinds=[EventKind.LOG])]


def test_a_specification_comes_back(folder: JobFolder) -> None:
    assert folder.spec() == spec()


def test_events_and_output_come_once(folder: JobFolder, store: Store) -> None:
    log = EventLog(folder, 1)
    log.write("RUN", {"step": 0, "max_steps": 9})
    log.write("METRICS", metrics(1))
    folder.output_file.write_bytes(b"one\ntwo\nthr")
    job, new = ingest(store, folder, store.get("job"))
    assert new
    assert (job.state, job.step, job.max_steps, job.epoch) == (JobState.RUNNING, 1, 9, 0.5)
    assert texts(store) == ["one", "two"]  # the third is not whole
    assert ingest(store, folder, job) == (job, False)

    with folder.output_file.open("ab") as output:
        output.write(b"ee\nprogress 1\rprogress 2\n\n")
    log.write("METRICS", metrics(2))
    log.close()
    again = store.get("job")  # as a service that was started again has it
    job, _ = ingest(store, folder, again)
    assert texts(store) == ["one", "two", "three", "progress 2"]
    assert [e.body["step"] for e in store.events("job", kinds=[EventKind.METRICS])] == [1, 2]
    sequences = [event.sequence for event in store.events("job")]
    assert sequences == list(range(1, job.last_sequence + 1))


def test_a_line_that_its_writer_was_killed_in_does_not_count(folder: JobFolder, store: Store) -> None:
    first = EventLog(folder, 1)
    first.write("METRICS", metrics(1))
    first.close()
    with folder.events_file.open("ab") as file:
        file.write(b'{"kind": "METRICS", "time": 1.0, "att')
    job, _ = ingest(store, folder, store.get("job"))
    second = EventLog(folder, 2)
    second.write("METRICS", metrics(7))
    second.close()
    job, _ = ingest(store, folder, job)
    assert [e.body["step"] for e in store.events("job", kinds=[EventKind.METRICS])] == [1, 7]
    assert job.step == 7


def test_the_last_line_counts_without_an_end_where_nobody_writes(folder: JobFolder, store: Store) -> None:
    folder.output_file.write_bytes(b"killed in the mid")
    job, new = ingest(store, folder, store.get("job"))
    assert not new
    ingest(store, folder, job, rest=True)
    assert texts(store) == ["killed in the mid"]


def test_a_line_without_an_end_in_sight_comes_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 25 + b"\nb\n")
    found, offset = [], 0
    while (step := read_lines(path, offset, 10))[1] > offset:
        found += step[0]
        offset = step[1]
    assert b"".join(found) == b"a" * 25 + b"b"
    assert offset == path.stat().st_size


def test_checkpoints_that_are_whole(folder: JobFolder) -> None:
    for step, state in (
        (1, '{"global_step": 1}'),
        (10, '{"global_step": 10}'),
        (3, "{"),
        (4, None),
        (5, '{"global_step": 6}'),
    ):
        path = folder.checkpoints_folder / f"checkpoint-{step}"
        path.mkdir()
        (path / "weights").write_bytes(b"x" * 100)
        if state is not None:
            (path / "trainer_state.json").write_text(state)
    found = folder.checkpoints()
    assert [one.step for one in found] == [1, 10]
    assert found[0].nbytes == 100 + len('{"global_step": 1}')
    folder.drop_incomplete()
    assert sorted(path.name for path in folder.checkpoints_folder.iterdir()) == [
        "checkpoint-1",
        "checkpoint-10",
    ]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_outcome_counts(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also where the file system has no hard links."""

    def none(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    assert folder.outcome(1) == (Outcome.DIED, "its process was killed")
    folder.tell_outcome(1, Outcome.FAILED, "why")
    folder.tell_outcome(1, Outcome.DIED, "its training ended with code 1")
    assert folder.outcome(1) == (Outcome.FAILED, "why")
    assert folder.outcome(2)[0] is Outcome.DIED


def test_ranks_that_fail_at_once_tell_one_outcome_whole(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the one tells is on its way to the disk when the other tells something shorter."""
    told = ["the other rank failed, with what it says itself at some length", "no reward"]
    sync, left = os.fsync, told[1:]

    def meanwhile(descriptor: int) -> None:
        if left:
            folder.tell_outcome(1, Outcome.FAILED, left.pop())
            assert folder.outcome(1) == (Outcome.FAILED, told[1])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    folder.tell_outcome(1, Outcome.FAILED, told[0])
    assert not left
    assert folder.outcome(1) == (Outcome.FAILED, told[1])  # the first, which may have been read by now
    assert list(folder.path.glob("*.new*")) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_fails_says_more_than_one_that_was_left_alone(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Whichever tells first, or both at once."""
    sync, left = os.fsync, [1]

    def meanwhile(descriptor: int) -> None:
        if left:
            left.pop()
            folder.tell_outcome(1, Outcome.DIED, "the other rank has ended")
        sync(descriptor)

    if late:
        folder.tell_outcome(1, Outcome.DIED, "the other rank has ended")
    else:
        monkeypatch.setattr(os, "fsync", meanwhile)
    folder.tell_outcome(1, Outcome.FAILED, "no reward", over=(Outcome.DIED,))
    assert folder.outcome(1) == (Outcome.FAILED, "no reward")
    folder.tell_outcome(1, Outcome.DIED, "its training ended with code 1")
    folder.tell_outcome(1, Outcome.FAILED, "another reward", over=(Outcome.DIED,))
    assert folder.outcome(1) == (Outcome.FAILED, "no reward")


def test_an_outcome_that_cannot_be_read_is_none(folder: JobFolder) -> None:
    (folder.path / "outcome-1.json").mkdir()
    with pytest.raises(IsADirectoryError):
        folder.outcome(1)


KILLED = """
import os, sys
from pathlib import Path
from trainer_service.jobs.folder import JobFolder
os.fsync = lambda _: os.kill(os.getpid(), 9)
JobFolder(Path(sys.argv[1])).reserve()
"""


def test_nothing_is_left_of_a_file_whose_writer_was_killed(folder: JobFolder) -> None:
    before = {path.name for path in folder.path.iterdir()}
    subprocess.run(
        [sys.executable, "-c", KILLED, str(folder.path)], env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert {path.name for path in folder.path.iterdir()} > before
    folder.drop_incomplete()
    assert {path.name for path in folder.path.iterdir()} == before


def test_an_outcome_is_told_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        folder = JobFolder(disk / "job")
        folder.make(spec())
        folder.reserve()
        log = EventLog(folder, 1)
        fill(disk)
        with pytest.raises(OSError, match=r"No space left|not written whole") as raised:  # noqa: PT012  # a page may have room for some
            for step in range(200):
                log.write("METRICS", metrics(step))
        log.close()
        assert is_full(raised.value)
        assert folder.outcome(1)[0] is Outcome.DIED
        folder.tell_outcome(1, Outcome.FAILED, FULL)
        assert folder.outcome(1) == (Outcome.FAILED, FULL)
        fill(disk)
        with pytest.raises(OSError, match=r"No space left|not written whole") as raised:
            folder.make(spec())
        assert is_full(raised.value)
        assert JobFolder(disk / "job").spec() == spec()  # what was there stays whole


@pytest.mark.parametrize("library", ["torch", "safetensors", "python"])
def test_a_full_disk_is_known_in_the_words_of_each_library(tmp_path: Path, library: str) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"weight": torch.zeros(1 << 20)}
    with small_disk(tmp_path / "disk", 2) as disk:
        fill(disk, 256 << 10)
        with pytest.raises(Exception, match=r".") as raised:  # noqa: PT012  # each its own
            if library == "torch":
                torch.save(tensors, disk / "file")
            elif library == "safetensors":
                save_file(tensors, disk / "file")
            else:
                try:
                    (disk / "file").write_bytes(bytes(4 << 20))
                except OSError as error:
                    raise ValueError("a reward failed") from error
        assert is_full(raised.value, disk)


def test_other_errors_are_of_no_full_disk(tmp_path: Path) -> None:
    assert not is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not is_full(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)


def test_a_process_is_not_taken_for_another() -> None:
    process = subprocess.Popen(["sleep", "60"])
    identity = Identity.of(process.pid)
    try:
        assert Identity.parse(str(identity)) == identity
        assert identity.alive
        assert not Identity(identity.pid, identity.started + 1, identity.boot).alive
        assert not Identity(identity.pid, identity.started, "another boot").alive
        assert Identity(identity.pid, identity.started + 1, identity.boot).session == -1
        identity.send(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        assert not identity.alive
        assert identity.open() is None
        identity.send(signal.SIGTERM)  # of nobody
    finally:
        process.kill()
        process.wait(10)


def _is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _wait_for_five(folder: Path, root: Identity) -> set[int]:
    """The four sleepers, each where it is to be, and what started them."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = processes.members(folder, root)
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2] for pid in found]
        if {b"600", b"601", b"602", b"603", b"604"} <= {command[-1] for command in commands}:
            return found
        time.sleep(0.02)
    raise AssertionError("they never started")


LEFT = """
import os, subprocess, sys
clean = {"PATH": os.environ["PATH"]}
subprocess.Popen(["sleep", "600"])                                             # in the session, with the mark
subprocess.Popen(["sleep", "601"], start_new_session=True)                     # only with the mark
subprocess.Popen(["sleep", "602"], env=clean)                                  # only in the session
subprocess.Popen(["bash", "-c", "setsid env -i sleep 603 & sleep 604"], env=clean)  # only by its parent
print("up", flush=True)
sys.stdin.read()
"""


def test_whatever_a_job_started_is_found_and_ended(folder: JobFolder) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LEFT],
        env=os.environ | {MARK: str(folder.path)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    bystander = subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: f"{folder.path}2"})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        root = Identity.of(process.pid)
        found = _wait_for_five(folder.path, root)
        assert process.pid in found
        processes.kill(folder.path, root)
        assert process.wait(10) == -signal.SIGKILL
        assert processes.members(folder.path, root) == set()
        assert bystander.poll() is None
        assert not [pid for pid in found if Path(f"/proc/{pid}").exists() and not _is_over(pid)]
    finally:
        processes.kill(folder.path, None)
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        bystander.kill()
        bystander.wait(10)


DAEMON = """
import subprocess
nowhere = subprocess.DEVNULL
print(subprocess.Popen(["sleep", "600"], stdout=nowhere, stderr=nowhere).pid, flush=True)
"""


@pytest.mark.parametrize("marked", [False, True])
def test_a_session_without_its_leader_is_the_jobs_only_where_it_has_the_mark(
    folder: JobFolder, marked: bool
) -> None:
    """A daemon's may have the id of a process that the job had long before."""
    own = {MARK: str(folder.path)} if marked else {}
    leader = subprocess.run(
        ["setsid", sys.executable, "-c", DAEMON], env=os.environ | own, capture_output=True, text=True
    )
    left = int(leader.stdout)
    session = int(Path(f"/proc/{left}/stat").read_text().rpartition(")")[2].split()[3])
    try:
        processes.kill(folder.path, Identity(session, 1, processes.boot_id()))
        assert _is_over(left) == marked
    finally:
        if not _is_over(left):
            os.kill(left, signal.SIGKILL)


def test_an_event_is_one_line_whatever_is_in_it(folder: JobFolder) -> None:
    log = EventLog(folder, 3)
    log.write("SAMPLES", {"text": "two\nlines \u2028 and more"})
    log.close()
    lines = folder.events_file.read_bytes().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0])["attempt"] == 3


def test_sockets_of_processes_that_ended_are_removed_and_nothing_else(folder: JobFolder) -> None:
    assert folder.holds_sockets == (len(str(folder.path)) + 37 <= MAX_UNIX_PATH_BYTES)
    assert not JobFolder(Path("/" + 80 * "x")).holds_sockets
    before = {path.name for path in folder.path.iterdir()}
    os.mknod(folder.path / "left", stat.S_IFSOCK | 0o600)  # whatever the length of its path
    folder.drop_sockets()
    assert {path.name for path in folder.path.iterdir()} == before
