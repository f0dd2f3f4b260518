"""The descriptor socket: who gets the engine's memory, and who does not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import torch

from inference_service import descriptor_socket
from inference_service.descriptor_socket import MAX_SILENT
from inference_service.transports import SHARED
from tandem.errors import NotFound, Reason
from tests.session_sockets import (
    NOBODY,
    Make,
    as_root,
    attach,
    close,
    ended,
    open_descriptors,
    shared,
    started,
)
from weight_transfer import descriptors
from weight_transfer.arena import Arena

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Start Sessions with `await make(**arguments)`."""
    async with started() as start:
        yield start


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
    monkeypatch.setattr(descriptor_socket, "TOKEN_SECONDS", 0.05)
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
    assert len(sessions._socket._silent) <= MAX_SILENT
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
