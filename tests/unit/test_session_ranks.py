"""Sessions of trainers that have several ranks, each of which writes the memory of one of the engine's workers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from inference_service import sessions as sessions_module
from inference_service.session import Session
from inference_service.sessions import ATTACH_SECONDS, Sessions
from inference_service.transports import SHARED, STREAM
from tandem.errors import FailedPrecondition, NotFound, Reason
from tests.session_sockets import SPECS, Make, attach, close, ended, shared, started
from trainer_service.updates import HELD_S
from weight_transfer.identity import ProcessIdentity

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Start Sessions with `await make(**arguments)`."""
    async with started() as start:
        yield start


async def split(make: Make, **arguments: Any) -> tuple[Sessions, Session]:
    """A session of two ranks, over an engine of two workers."""
    sessions = await make()
    sessions._arenas._ranks = [0, 1]
    return sessions, shared(sessions, members=[ProcessIdentity.current()], **arguments)


@pytest.mark.parametrize("first_to_go", [0, 1])
async def test_all_ranks_fetch_the_descriptors_and_any_of_them_ends_the_session(
    make: Make, first_to_go: int
) -> None:
    sessions, session = await split(make)
    assert (session.transport, session.ranks, session.aliased) == (SHARED, 2, False)
    connections = []
    for _ in range(2):
        with pytest.raises(NotFound):
            sessions.get(session.id)  # nobody begins before all are there
        fds, connection = await attach(sessions, session.token)
        close(fds)
        connections.append(connection)
    await until(lambda: session.attached)
    assert sessions.get(session.id) is session
    with pytest.raises(PermissionError):  # a third
        await attach(sessions, session.token)
    over = asyncio.ensure_future(ended(session))
    await asyncio.sleep(0)
    connections.pop(first_to_go).close()
    assert "closed its session or died" in await over
    with pytest.raises(NotFound):
        sessions.get(session.id)
    assert session.alive, "the other one may still write"
    connections.pop().close()
    await until(lambda: not session.alive)


async def test_a_rank_that_never_fetches_the_descriptors_ends_the_session(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "ATTACH_SECONDS", 1.0)  # in which one rank has to
    sessions, session = await split(make)
    fds, connection = await attach(sessions, session.token)
    close(fds)
    assert await ended(session) == "1 of the trainer's 2 ranks never fetched the descriptors"
    with pytest.raises(PermissionError):
        await attach(sessions, session.token)
    connection.close()
    await until(lambda: not session.alive)


async def test_ranks_of_a_large_model_have_the_time_to_read_it(make: Make) -> None:
    """It took 8 s to read and check a mixture's 300,000 blocks, on one of the ranks."""
    sessions = await make()
    placements = sessions._arenas.placements
    few = sessions._attach_seconds()
    assert ATTACH_SECONDS < few < HELD_S
    sessions._arenas.placements = placements * (300_000 // sum(len(p.blocks) for p in placements))
    assert sessions._attach_seconds() > ATTACH_SECONDS + 16


async def test_each_rank_must_be_where_memory_can_be_shared(make: Make) -> None:
    sessions = await make()
    mine = ProcessIdentity.current()
    boxed = ProcessIdentity(mine.boot_id, 1, 1, 1)
    assert sessions.open(SPECS, mine, members=[boxed]).ranks == 1, "one worker has one writer"
    sessions = await make()
    sessions._arenas._ranks = [0, 1]
    with pytest.raises(FailedPrecondition, match=r"shared: members\[1\].pid_namespace: the two") as caught:
        sessions.open(SPECS, mine, SHARED, members=[mine, boxed])
    assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE
    assert [violation.field for violation in caught.value.violations] == ["members[1].pid_namespace"]
    far = ProcessIdentity("other", mine.pid_namespace, 1, 1)
    session = sessions.open(SPECS, mine, members=[far])
    assert session.transport == STREAM
    assert session.reason == "members[0].boot_id: the two processes are on different hosts"


async def test_the_ranks_must_be_on_all_of_the_engines_gpus(make: Make) -> None:
    mine = ProcessIdentity.current()
    on = [dataclasses.replace(mine, gpu_uuids=(f"GPU-{i}",)) for i in range(3)]
    engine = dataclasses.replace(mine, gpu_uuids=("GPU-0", "GPU-1"))
    assert engine.why_not_shared(on[0], [on[1]]) == engine.why_not_shared(on[1], [on[0], on[2]]) == ("", "")
    field, why = engine.why_not_shared(on[0], [on[2]])
    assert (field, why) == (
        "members",
        "the policy is on different devices: GPU-0, GPU-1 here, GPU-0, GPU-2 there",
    )
    assert engine.why_not_shared(on[0])[0] == "identity.gpu_uuids"
    assert mine.why_not_shared(mine, [mine]) == ("", "")
    assert "no GPU here" in mine.why_not_shared(on[0], [mine])[1]


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110  it is looked at from outside
            await asyncio.sleep(0.005)
