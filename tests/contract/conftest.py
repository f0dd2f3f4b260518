"""A real server and its clients. Nothing is mocked: gRPC runs over Unix sockets and loopback TCP."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine import ENGINE, RAW, ScriptedEngine, add_raw

from tandem.engine.v1 import engine_pb2_grpc
from tandem.rpc import Serving, ServingConfig

Serve = Callable[..., Awaitable[Serving]]


@pytest.fixture(autouse=True)
def _limit(request: pytest.FixtureRequest) -> None:
    """No contract test may take long, whatever hangs."""
    if request.node.get_closest_marker("timeout") is None:
        request.node.add_marker(pytest.mark.timeout(30))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: a socket's may have 107 bytes, and pytest's own folders are deep."""
    path = Path(tempfile.mkdtemp(prefix="tandem-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine servicer whose methods do what the test says."""
    return ScriptedEngine()


@pytest.fixture
async def serve(folder: Path, engine: ScriptedEngine) -> AsyncIterator[Serve]:
    """Start servers with `await serve(**fields of ServingConfig)`; by default on `folder/socket`."""
    servings: list[Serving] = []

    async def start(**fields: Any) -> Serving:
        fields.setdefault("addresses", (f"unix://{folder}/socket",))
        fields.setdefault("handle_signals", False)
        fields.setdefault("grace_s", 2.0)
        serving = Serving(ServingConfig(**fields))
        serving.add(engine_pb2_grpc.add_EngineServiceServicer_to_server, engine, ENGINE)
        serving.add(add_raw, engine, RAW, long_lived=["Watch"])
        await serving.start()
        servings.append(serving)
        return serving

    yield start
    for serving in servings:
        serving.request_stop(now=True)
        await serving.wait()


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    """How many descriptors this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))


async def failure(call: Any, limit_s: float = 5.0) -> grpc.aio.AioRpcError:
    """Await a call that must fail, and not by the client's own patience."""
    async with asyncio.timeout(limit_s):
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error
    raise AssertionError("the call did not fail")
