"""Sessions: who may have one, and when it is over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from inference_service import sessions as sessions_module
from inference_service.session import Session
from inference_service.sessions import MAX_STREAM_SESSIONS, Sessions
from inference_service.transports import SHARED, STREAM
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from tests.session_sockets import SPECS, Make, attach, close, ended, shared, started
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import TensorSpec

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Start Sessions with `await make(**arguments)`."""
    async with started() as start:
        yield start


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
    monkeypatch.setattr(sessions_module, "ATTACH_SECONDS", 1.0)  # in which the second one has to attach
    sessions = await make()
    session = shared(sessions)
    assert await ended(session) == "the trainer never fetched the descriptors"
    with pytest.raises(PermissionError):
        await attach(sessions, session.token)
    attached = shared(sessions)
    fds, connection = await attach(sessions, attached.token)
    close(fds)
    await asyncio.sleep(1.1)  # as long as the unattached one had
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
