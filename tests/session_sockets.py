"""Sessions of a made-up engine with their descriptor socket, and who calls there."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from inference_service.arenas import HostArenas
from inference_service.session import Session
from inference_service.sessions import Sessions
from weight_transfer import descriptors
from weight_transfer.arena import Arena
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement

SPECS = (TensorSpec("a", "bfloat16", (4, 2)), TensorSpec("b", "float32", (3,)))
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")


def engine_arenas() -> HostArenas:
    placements = [
        Placement(SPECS[0], (Block(0, 0, (2, 1), 0, (2, 1), (4, 2)),)),
        Placement(SPECS[1], (Block(1, 8, (1,), 0, (1,), (3,)),)),
    ]
    return HostArenas([Arena.create("one", 256), Arena.create("two", 512)], placements)


Make = Callable[..., Any]


@asynccontextmanager
async def started() -> AsyncIterator[Make]:
    """Start Sessions with what this gives. They are stopped, and leave nothing."""
    before, folders, running = open_descriptors(), [], []

    async def start(**arguments: Any) -> Sessions:
        sessions = Sessions(engine_arenas(), **arguments)
        await sessions.start()
        running.append(sessions)
        folders.append(Path(sessions.path).parent)
        return sessions

    yield start
    for sessions in running:
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
