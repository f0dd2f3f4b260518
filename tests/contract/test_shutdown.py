"""A server stops in order: told first, drained next, and never held up by somebody who only watches."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Serve, failure
from engine import ENGINE, Raw, ScriptedEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import Reason
from tandem.rpc import Serving, connect_aio, translate

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def stop(serving: Serving) -> float:
    """Stop, and return the seconds it took."""
    begin = time.monotonic()
    serving.request_stop()
    await serving.wait()
    return time.monotonic() - begin


async def test_open_watches_do_not_hold_the_stop(serve: Serve, engine: ScriptedEngine) -> None:
    cleaned = asyncio.Event()

    async def watch(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"now"
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    engine.watch = watch
    serving = await serve(grace_s=20.0)
    serving.set_serving(ENGINE, True)
    async with connect_aio(serving.addresses[0]) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=ENGINE))
        ours = Raw(channel).watch(b"")
        assert (await health.read()).status == SERVING
        assert await ours.read() == b"now"
        assert await stop(serving) < 2
        assert cleaned.is_set()
        # Who watches is told, and the stream ends in order.
        assert (await health.read()).status == NOT_SERVING
        assert await health.read() is grpc.aio.EOF
        assert await ours.read() is grpc.aio.EOF
        assert (await health.code(), await ours.code()) == (grpc.StatusCode.OK, grpc.StatusCode.OK)


async def test_with_grpc_alone_a_watch_holds_the_stop(folder: Path) -> None:
    """The trap."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    server.add_insecure_port(f"unix://{folder}/bare")
    await server.start()
    async with connect_aio(f"unix://{folder}/bare") as channel:
        await health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()).read()
        begin = time.monotonic()
        await server.stop(0.5)
        assert time.monotonic() - begin > 0.45


async def test_running_calls_end_and_new_ones_are_refused(
    serve: Serve, engine: ScriptedEngine, folder: Path
) -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def pause(request: Any, context: Any) -> None:
        entered.set()
        await release.wait()

    engine.pause = pause
    order: list[str] = []

    async def after() -> None:
        order.append("stopped")

    async def fail() -> None:
        order.append("failed")
        raise RuntimeError("an engine that does not stop well")

    serving = await serve(grace_s=20.0)
    serving.on_stop(fail)
    serving.on_stop(after)
    async with connect_aio(serving.addresses[0]) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        call = stub.Pause(engine_pb2.PauseRequest())
        await asyncio.wait_for(entered.wait(), 5)
        stopping = asyncio.ensure_future(stop(serving))
        await asyncio.sleep(0.3)
        late = translate(await failure(stub.Pause(engine_pb2.PauseRequest(), timeout=3)))
        assert (late.code, late.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.DRAINING)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == NOT_SERVING
        assert order == []
        release.set()
        assert await call == engine_pb2.PauseResponse()
        await stopping
    assert order == ["failed", "stopped"]
    assert not (folder / "socket").exists()


async def test_a_call_that_outlives_the_grace_is_cancelled(serve: Serve, engine: ScriptedEngine) -> None:
    cleaned: list[str] = []
    entered = asyncio.Event()

    async def pause(request: Any, context: Any) -> None:
        entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)
            cleaned.append("handler")

    async def after() -> None:
        cleaned.append("callback")

    engine.pause = pause
    serving = await serve(grace_s=0.3)
    serving.on_stop(after)
    async with connect_aio(serving.addresses[0]) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Pause(engine_pb2.PauseRequest())
        await asyncio.wait_for(entered.wait(), 5)
        assert 0.3 < await stop(serving) < 3
        error = translate(await failure(call))
    assert cleaned == ["handler", "callback"]
    assert error.reason in (Reason.UNREACHABLE, Reason.CANCELLED)


async def test_the_drain_delay_keeps_answering(serve: Serve) -> None:
    serving = await serve(drain_delay_s=2)
    serving.set_serving(ENGINE, True)
    async with connect_aio(serving.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stopping = asyncio.ensure_future(stop(serving))
        await asyncio.sleep(0.2)
        health = await stub.Check(health_pb2.HealthCheckRequest(service=ENGINE))
        assert health.status == NOT_SERVING
        stats = await engine_pb2_grpc.EngineServiceStub(channel).GetStats(engine_pb2.GetStatsRequest())
        assert stats.reason == "it works"
        serving.set_serving(ENGINE, True)  # too late: the drain has the last word
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=ENGINE))).status == NOT_SERVING
        assert await stopping > 2


async def test_a_cancelled_wait_cleans_up_as_well(serve: Serve, folder: Path) -> None:
    serving = await serve()
    waiting = asyncio.ensure_future(serving.wait())
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not (folder / "socket").exists()


PROGRAM = textwrap.dedent("""
    import asyncio, sys
    from tandem.rpc import Serving, ServingConfig
    from engine import ENGINE, ScriptedEngine
    from tandem.engine.v1 import engine_pb2_grpc

    async def pause(request, context):
        print("in pause", flush=True)
        await asyncio.sleep(60)

    async def stopped():
        print("stopped", flush=True)

    async def main():
        engine = ScriptedEngine()
        engine.pause = pause
        serving = Serving(ServingConfig(addresses=(sys.argv[1],), grace_s=30))
        serving.add(engine_pb2_grpc.add_EngineServiceServicer_to_server, engine, ENGINE)
        serving.on_stop(stopped)
        await serving.start()
        print("started", flush=True)
        await serving.wait()

    asyncio.run(main())
""")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_signal_drains_and_a_second_one_stops_at_once(folder: Path, number: signal.Signals) -> None:
    address = f"unix://{folder}/socket"
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, address, env=env, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None

    async def line(word: bytes) -> None:
        assert child.stdout is not None
        while (got := await child.stdout.readline()).strip() != word:
            assert got, f"the server ended before it said {word!r}"

    try:
        await line(b"started")
        async with connect_aio(address) as channel:
            call = engine_pb2_grpc.EngineServiceStub(channel).Pause(engine_pb2.PauseRequest())
            pending = asyncio.ensure_future(failure(call, 20))
            await line(b"in pause")
            child.send_signal(number)
            await asyncio.sleep(0.5)
            assert child.returncode is None, "the running call has its grace"
            begin = time.monotonic()
            child.send_signal(number)
            await line(b"stopped")
            assert await child.wait() == 0
            assert time.monotonic() - begin < 5
            await pending
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
