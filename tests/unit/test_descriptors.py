"""The descriptor socket: who gets the engine's memory, who does not, and when a session is over."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from inference_service import sessions as sessions_module
from inference_service.arenas import HostArenas
from inference_service.sessions import MAX_SILENT, MAX_STREAM_SESSIONS, SHARED, STREAM, Session, Sessions
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from weight_transfer import descriptors
from weight_transfer.arena import Arena
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement

SPECS = (TensorSpec("a", "bfloat16", (4, 2)), TensorSpec("b", "float32", (3,)))
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def engine_arenas() -> HostArenas:
    placements = [
        Placement(SPECS[0], (Block(0, 0, (2, 1), 0, (2, 1), (4, 2)),)),
        Placement(SPECS[1], (Block(1, 8, (1,), 0, (1,), (3,)),)),
    ]
    return HostArenas([Arena.create("one", 256), Arena.create("two", 512)], placements)


Make = Callable[..., Any]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Start Sessions with `await make(**arguments)`. They are stopped, and leave nothing."""
    before, folders, started = open_descriptors(), [], []

    async def start(**arguments: Any) -> Sessions:
        sessions = Sessions(engine_arenas(), **arguments)
        await sessions.start()
        started.append(sessions)
        folders.append(Path(sessions.path).parent)
        return sessions

    yield start
    for sessions in started:
        await sessions.stop()
        sessions._arenas.arenas.clear()
    assert not any(folder.exists() for folder in folders)
    if open_descriptors() > before:
        gc.collect()  # a failed test's traceback holds its frames
    # Fewer are fine: earlier tests' were closed meanwhile.
    assert open_descriptors() <= before, "a descriptor was left"


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared(sessions: Sessions, **arguments: Any) -> Session:
    return sessions.open(SPECS, ProcessIdentity.current(), **arguments)


async def attach(sessions: Sessions, token: bytes, count: int = 2) -> tuple[list[int], socket.socket]:
    return await asyncio.to_thread(descriptors.receive, sessions.path, token, count, 5.0)


async def ended(session: Session) -> str:
    """Wait for the session's end. The reason, or "" if it was over before."""
    if not session.alive:
        return ""
    reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with session.watched(reason.set_result):
        return await asyncio.wait_for(reason, 5)


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def test_the_token_gives_the_engines_memory(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    assert (session.transport, session.aliased) == (SHARED, True)
    with pytest.raises(NotFound):  # it is not a session before that
        sessions.get(session.id)
    fds, connection = await attach(sessions, session.token)
    assert sessions.get(session.id) is session
    arenas = [
        Arena.open(fd, size) for fd, size in zip(fds, [h.size for h in sessions._arenas.handles], strict=True)
    ]
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds), "a child would keep them"
    close(fds)
    arenas[1].tensor(0, (4,), torch.uint8).fill_(7)
    assert sessions._arenas.arenas[1].tensor(0, (4,), torch.uint8).eq(7).all()
    connection.close()
    assert "closed its session or died" in await ended(session)
    assert not session.alive
    with pytest.raises(NotFound) as caught:
        sessions.get(session.id)
    assert (caught.value.reason, caught.value.metadata) == (
        Reason.SESSION_NOT_FOUND,
        {"session_id": session.id},
    )


async def test_nobody_else_can_enter_the_folder(make: Make) -> None:
    sessions = await make()
    assert Path(sessions.path).parent.stat().st_mode & 0o777 == 0o700


# Callers that are none.


def say(path: str, words: bytes, then: str = "listen") -> bytes:
    """Connect, say `words`, and return the answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(path)
        connection.sendall(words)
        if then == "leave":
            return b""
        if then == "fall silent":
            connection.shutdown(socket.SHUT_WR)
        answer, fds, _ = descriptors.receive_descriptors(connection)
        close(fds)
        assert fds == []
        return answer


@pytest.mark.parametrize(
    ("words", "then"),
    [
        (b"x" * 32, "listen"),
        (b"\0" * 32, "listen"),
        (b"x" * 5000, "listen"),
        (b"short", "fall silent"),
        (b"", "fall silent"),
        (b"", "leave"),
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", "listen"),
    ],
    ids=["wrong", "zeros", "long", "short", "nothing", "gone", "http"],
)
async def test_whoever_has_no_token_gets_nothing(make: Make, words: bytes, then: str) -> None:
    sessions = await make()
    session = shared(sessions)
    try:
        answer = await asyncio.to_thread(say, sessions.path, words, then)
    except ConnectionResetError:  # it had more to say than was listened to
        answer = descriptors.REFUSED
    assert answer == (b"" if then == "leave" else descriptors.REFUSED)
    fds, connection = await attach(sessions, session.token)  # and the trainer is not disturbed
    close(fds)
    connection.close()
    await ended(session)


async def test_silence_is_not_listened_to_for_long(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "TOKEN_SECONDS", 0.05)
    sessions = await make()
    session = shared(sessions)
    assert await asyncio.to_thread(say, sessions.path, session.token[:31]) == descriptors.REFUSED
    assert await asyncio.to_thread(say, sessions.path, b"") == descriptors.REFUSED


async def test_a_token_is_good_once(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    with pytest.raises(PermissionError, match="gave no descriptors"):
        await attach(sessions, session.token)
    assert sessions.get(session.id) is session, "the second try did not end it"
    connection.close()
    await ended(session)
    with pytest.raises(PermissionError):
        await attach(sessions, session.token)


async def test_a_token_is_of_its_session(make: Make) -> None:
    sessions = await make()
    with pytest.raises(PermissionError):  # there is none
        await attach(sessions, b"\0" * 32)
    first = shared(sessions)
    fds, connection = await attach(sessions, first.token)
    close(fds)
    connection.close()
    await ended(first)
    second = shared(sessions)
    assert len(first.token) == 32
    assert first.token != second.token
    with pytest.raises(PermissionError):
        await attach(sessions, first.token)


async def test_a_word_too_many_ends_the_session(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    with connection:
        connection.sendall(b"hello?")
        await ended(session)


AS_ANOTHER = """
import os, sys
from weight_transfer import descriptors
os.setgroups([]); os.setgid({user}); os.setuid({user})
try:
    fds, connection = descriptors.receive(sys.argv[1], bytes.fromhex(sys.argv[2]), 2, 5.0)
    print("got", len(fds))
except OSError as error:
    print(type(error).__name__, error)
"""


async def as_another(path: str, token: bytes) -> str:
    """What a process of another user gets."""
    command = [sys.executable, "-c", AS_ANOTHER.format(user=NOBODY), path, token.hex()]
    run = asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30, check=True)
    return (await run).stdout.strip()


@as_root
async def test_another_user_cannot_even_come_near(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    assert "PermissionError [Errno 13]" in await as_another(sessions.path, session.token)


@as_root
async def test_another_user_is_refused_with_the_right_token(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    Path(sessions.path).parent.chmod(0o711)
    Path(sessions.path).chmod(0o666)
    assert "gave no descriptors" in await as_another(sessions.path, session.token)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    connection.close()
    await ended(session)


@as_root
async def test_a_user_that_was_named_may(make: Make) -> None:
    sessions = await make(uids=(NOBODY,))
    session = shared(sessions)
    assert await as_another(sessions.path, session.token) == "got 2"
    await ended(session)


# Many at once.


async def test_a_crowd_that_says_nothing_does_not_keep_the_trainer_out(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    crowd = []
    for _ in range(4 * MAX_SILENT):
        crowd.append(socket.socket(socket.AF_UNIX))
        crowd[-1].setblocking(False)
        try:
            crowd[-1].connect(sessions.path)
        except BlockingIOError:  # the queue is full: let the service at it
            await asyncio.sleep(0)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    assert len(sessions._silent) <= MAX_SILENT
    for one in crowd:
        one.close()
    connection.close()
    await ended(session)


async def test_a_crowd_that_keeps_coming_does_not_either(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    over = threading.Event()

    def come() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(1)
                try:
                    one.connect(sessions.path)
                    one.sendall(b"x" * 32)
                except OSError:
                    pass

    crowd = [threading.Thread(target=come) for _ in range(4)]
    for one in crowd:
        one.start()
    try:
        fds, connection = await attach(sessions, session.token)
    finally:
        over.set()
        for one in crowd:
            await asyncio.to_thread(one.join, 5)
    close(fds)
    connection.close()
    await ended(session)


async def test_a_service_without_descriptors_left_accepts_again_later(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = asyncio.Event()
    loop = asyncio.get_running_loop()
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 2, hard))
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with structlog.testing.capture_logs() as logs:
            one.connect(sessions.path)
            loop.call_later(0.05, refused.set)
            await refused.wait()
        assert any("could not be accepted" in line["event"] for line in logs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close(taken)
    with one:
        one.sendall(session.token)
        answer, fds, _ = await asyncio.to_thread(descriptors.receive_descriptors, one)
    close(fds)
    assert (answer, len(fds)) == (descriptors.OK, 2)
    await ended(session)


# The end of a session.

TRAINER = """
import os, sys, time
from weight_transfer import descriptors
fds, connection = descriptors.receive(sys.argv[1], bytes.fromhex(sys.argv[2]), 2, 5.0)
child = os.fork() if sys.argv[3] == "fork" else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


async def trainer(sessions: Sessions, session: Session, how: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process that has the memory. With "fork", one with a child that inherited the connection."""
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", TRAINER, sessions.path, session.token.hex(), how], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    child = int(await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20))
    return process, child


@pytest.mark.parametrize("how", ["alone", "fork"])
async def test_a_killed_trainer_ends_its_session(make: Make, how: str) -> None:
    sessions = await make()
    session = shared(sessions)
    process, child = await trainer(sessions, session, how)
    try:
        over = asyncio.ensure_future(ended(session))
        await asyncio.sleep(0)
        process.kill()
        assert f"process {process.pid}" in await over
        await asyncio.to_thread(process.wait, 5)
        shared(sessions)  # the next one may come
    finally:
        if how == "fork":
            os.kill(child, signal.SIGKILL)
        process.kill()
        assert process.stdout is not None
        process.stdout.close()


async def test_a_stopped_trainer_keeps_its_session(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    process, _ = await trainer(sessions, session, "alone")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(Aborted, match="another trainer shares"):
        shared(sessions)
    assert session.alive
    over = asyncio.ensure_future(ended(session))
    await asyncio.sleep(0)
    process.kill()
    await over
    await asyncio.to_thread(process.wait, 5)
    assert process.stdout is not None
    process.stdout.close()


async def test_a_session_that_is_never_attached_gives_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "ATTACH_SECONDS", 0.05)
    sessions = await make()
    session = shared(sessions)
    assert await ended(session) == "the trainer never fetched the descriptors"
    with pytest.raises(PermissionError):
        await attach(sessions, session.token)
    attached = shared(sessions)
    fds, connection = await attach(sessions, attached.token)
    close(fds)
    await asyncio.sleep(0.1)  # as long as the unattached one had
    assert sessions.get(attached.id) is attached
    connection.close()
    await ended(attached)


async def test_a_dead_trainer_that_never_attached_is_given_up_before_trainers_lose_patience() -> None:
    from trainer_service.updates import HELD_S

    assert sessions_module.ATTACH_SECONDS < HELD_S


async def test_the_services_stop_ends_sessions(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    over = asyncio.ensure_future(ended(session))
    await asyncio.sleep(0)
    await sessions.stop()
    assert await over == "the service stopped"
    assert connection.recv(1) == b""
    connection.close()


async def test_watching_ends_with_its_block(make: Make) -> None:
    sessions = await make()
    session = shared(sessions)
    told: list[str] = []
    for _ in range(3):
        with session.watched(told.append):
            pass
    assert session._watchers == []
    with session.watched(told.append):
        session.end("over")
    assert told == ["over"]


# Who may have a session.


async def test_one_trainer_shares(make: Make) -> None:
    sessions = await make()
    shared(sessions)
    for transport in ("", SHARED, STREAM):
        with pytest.raises(Aborted) as caught:
            shared(sessions, transport=transport)
        assert caught.value.reason == Reason.LEASE_HELD


async def test_the_transport_is_chosen_and_says_why(make: Make) -> None:
    sessions = await make()
    mine = ProcessIdentity.current()
    far = ProcessIdentity("other", mine.pid_namespace, 1, 1)
    session = sessions.open(SPECS, far)
    assert (session.transport, session.reason) == (STREAM, "the two processes are on different hosts")
    boxed = ProcessIdentity(mine.boot_id, 1, 1, 1)
    session = sessions.open(SPECS, boxed)
    assert session.transport == STREAM
    assert "PID namespaces" in session.reason
    for identity in (far, boxed):
        with pytest.raises(FailedPrecondition, match=r"shared: the two processes are") as caught:
            sessions.open(SPECS, identity, SHARED)
        assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE
    asked = sessions.open(SPECS, mine, STREAM)
    assert (asked.transport, asked.reason) == (STREAM, "")


async def test_what_is_aliased_is_told_by_dtype_and_place(make: Make) -> None:
    sessions = await make()
    cast = (TensorSpec("a", "float32", (4, 2)), SPECS[1])
    session = sessions.open(cast, ProcessIdentity.current())
    assert (session.transport, session.aliased) == (SHARED, False)


async def test_a_manifest_with_faults_names_all_and_changes_nothing(make: Make) -> None:
    sessions = await make()
    wrong = (TensorSpec("a", "int8", (2, 4)), TensorSpec("c", "float32", ()))
    with pytest.raises(InvalidArgument) as caught:
        sessions.open(wrong, ProcessIdentity.current())
    assert caught.value.reason == Reason.MANIFEST_MISMATCH
    assert [v.field for v in caught.value.violations] == [
        "tensors[a]",
        "tensors[a]",
        "tensors[b]",
        "tensors[c]",
    ]
    assert caught.value.message.startswith("3 tensors are not the engine's, first a: ")
    shared(sessions)


async def test_an_engine_that_cannot_be_updated_says_why(make: Make) -> None:
    sessions = await make()
    sessions._arenas.reason = "its weights are quantized"
    with pytest.raises(FailedPrecondition, match="quantized") as caught:
        shared(sessions)
    assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE


async def test_of_many_streams_the_ones_unused_for_longest_go(make: Make) -> None:
    sessions = await make()
    first = shared(sessions, transport=STREAM)
    second = shared(sessions, transport=STREAM)
    for _ in range(MAX_STREAM_SESSIONS - 1):
        sessions.get(first.id)
        shared(sessions, transport=STREAM)
    assert sessions.get(first.id) is first
    with pytest.raises(NotFound):
        sessions.get(second.id)


# The trainer's end, with a service that is none.


class Impostor:
    """Listens, and answers what a test wants."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tdm")
        self.path = f"{self.folder.name}/s"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(answer,))
        self._thread.start()

    def _serve(self, answer: Callable[[socket.socket], None]) -> None:
        connection, _ = self._listener.accept()
        with connection:
            answer(connection)

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join(5)
        self._listener.close()
        self.folder.cleanup()
        assert not self._thread.is_alive()


def send(status: bytes, count: int) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(32)
        with open("/dev/null") as null:
            socket.send_fds(connection, [status], [null.fileno()] * count)

    return answer


ANSWERS = {
    "no": (lambda c: descriptors.refuse(c), "gave no descriptors"),
    "no, with descriptors": (send(descriptors.REFUSED, 2), "gave no descriptors"),
    "too few": (send(descriptors.OK, 1), "answered out of protocol"),
    "too many": (send(descriptors.OK, 3), "answered out of protocol"),
    "far too many": (send(descriptors.OK, 100), "answered out of protocol"),
    "none": (send(descriptors.OK, 0), "answered out of protocol"),
    "another word": (send(b"\x07", 2), "answered out of protocol"),
    "goodbye": (lambda c: c.recv(32) and None, "answered out of protocol"),
}


@pytest.mark.parametrize(("answer", "text"), ANSWERS.values(), ids=ANSWERS)
def test_answers_out_of_protocol(answer: Callable[[socket.socket], None], text: str) -> None:
    gc.collect()  # what earlier tests left to the collector is not ours to count
    before = open_descriptors()
    with Impostor(answer) as impostor, pytest.raises(PermissionError, match=text):
        descriptors.receive(impostor.path, b"x" * 32, 2, 5.0)
    assert open_descriptors() <= before, "descriptors that came along were left open"


def test_a_service_that_says_nothing_is_given_up() -> None:
    over = threading.Event()
    with Impostor(lambda c: over.wait(5) and None) as impostor:
        with pytest.raises(TimeoutError):
            descriptors.receive(impostor.path, b"x" * 32, 2, 0.05)
        over.set()


def test_nobody_there(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        descriptors.receive(str(tmp_path / "s"), b"x" * 32, 2, 5.0)
    with pytest.raises(OSError, match="too long"):
        descriptors.receive("/" + "x" * 200, b"x" * 32, 2, 5.0)
    assert open_descriptors() <= before


def test_a_full_queue_is_waited_for_and_no_longer_than_asked() -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(f"{folder}/s")
            with pytest.raises(TimeoutError, match="busy"):
                descriptors.receive(f"{folder}/s", b"x" * 32, 2, 0.05)


IMPOSTOR_AS_ANOTHER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
os.setgid({user}); os.setuid({user})
listener.listen()
print("listening", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(32)), flush=True)
"""


@as_root
def test_another_users_service_is_told_nothing() -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        path = f"{folder}/s"
        command = [sys.executable, "-c", IMPOSTOR_AS_ANOTHER.format(user=NOBODY), path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as impostor:
            assert impostor.stdout is not None
            assert impostor.stdout.readline() == "listening\n"
            with pytest.raises(PermissionError, match=f"belongs to uid {NOBODY}"):
                descriptors.receive(path, b"x" * 32, 2, 5.0)
            assert impostor.stdout.readline() == "0\n", "it was told the token"
            impostor.wait(5)
