"""Health, reflection, metrics and what systemd and containers see."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import prometheus_client
import pytest
from conftest import Serve, failure
from engine import ENGINE, RAW, Raw, ScriptedEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import Reason
from tandem.rpc import Serving, connect_aio, translate

Response = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, SERVICE_UNKNOWN = Response.SERVING, Response.NOT_SERVING, Response.SERVICE_UNKNOWN
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


def named(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_the_process_serves_before_its_services_do(serve: Serve) -> None:
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> dict[str, int]:
            listed = await stub.List(health_pb2.HealthListRequest())
            checked = {name: (await stub.Check(named(name))).status for name in listed.statuses}
            assert {name: response.status for name, response in listed.statuses.items()} == checked
            return checked

        assert await statuses() == {"": SERVING, ENGINE: NOT_SERVING, RAW: NOT_SERVING}
        serving.set_serving(ENGINE, True)
        assert await statuses() == {"": SERVING, ENGINE: SERVING, RAW: NOT_SERVING}
        serving.set_serving("", False)
        assert await statuses() == {"": NOT_SERVING, ENGINE: SERVING, RAW: NOT_SERVING}
        error = translate(await failure(stub.Check(named("no.such.Service"))))
        assert error.reason is Reason.SERVICE_NOT_FOUND
    with pytest.raises(KeyError):
        serving.set_serving("no.such.Service", True)


async def test_watch_follows_every_change(serve: Serve) -> None:
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch, unknown = stub.Watch(named(ENGINE)), stub.Watch(named("no.such.Service"))
        assert (await unknown.read()).status == SERVICE_UNKNOWN
        seen = [(await watch.read()).status]
        for serves in (True, False, False, True):
            serving.set_serving(RAW, serves)  # of no concern to this watcher
            serving.set_serving(ENGINE, serves)
            if serves != (seen[-1] == SERVING):
                seen.append((await watch.read()).status)
        assert seen == [NOT_SERVING, SERVING, NOT_SERVING, SERVING]


async def files_of(address: str, symbol: str) -> list[str]:
    async with connect_aio(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
        ]
        listed, found = [response async for response in stub.ServerReflectionInfo(iter(requests))]
        assert len(found.file_descriptor_response.file_descriptor_proto) >= 1
        return [service.name for service in listed.list_services_response.service]


async def test_reflection_answers_v1alpha_and_only_that(serve: Serve) -> None:
    serving = await serve()
    assert set(await files_of(serving.addresses[0], ENGINE)) == {
        ENGINE,
        RAW,
        "grpc.health.v1.Health",
        REFLECTION,
    }
    async with connect_aio(serving.addresses[0]) as channel:
        v1 = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        assert (await failure(v1(iter([b""])).read())).code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("fields", [{"reflection": False}, {"addresses": ("0.0.0.0:0",), "insecure": True}])
async def test_reflection_is_off_when_told_and_where_others_reach(
    serve: Serve, fields: dict[str, Any]
) -> None:
    serving = await serve(**fields)
    address = serving.addresses[0].replace("0.0.0.0", "127.0.0.1")
    async with connect_aio(address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([]))
        assert (await failure(call.read())).code() == grpc.StatusCode.UNIMPLEMENTED


def counted(method: str, code: str = "OK", service: str = RAW) -> float:
    labels = {"grpc_service": service, "grpc_method": method, "grpc_code": code}
    return prometheus_client.REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110  # a counter wakes nobody
            await asyncio.sleep(0.01)


async def test_every_kind_of_call_and_end_is_counted(serve: Serve, engine: ScriptedEngine) -> None:
    async def one(request: Any, context: Any) -> bytes:
        return b""

    async def many(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b""

    async def forever(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b""
        await asyncio.sleep(60)

    engine.unary_unary = engine.stream_unary = one
    engine.unary_stream = engine.stream_stream = many
    engine.watch = forever
    kinds = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
    before = {kind: counted(kind) for kind in kinds}
    ends = [
        ("Watch", "CANCELLED", RAW),
        ("Watch", "DEADLINE_EXCEEDED", RAW),
        ("unknown", "UNIMPLEMENTED", "unknown"),
    ]
    ends_before = [counted(*end) for end in ends]
    serving = await serve(metrics_address="127.0.0.1:0")
    async with connect_aio(serving.addresses[0]) as channel:
        raw = Raw(channel)
        await raw.unary_unary(b"")
        await raw.stream_unary(iter([b""]))
        assert [message async for message in raw.unary_stream(b"")] == [b""]
        assert [message async for message in raw.stream_stream(iter([b""]))] == [b""]
        cancelled = raw.watch(b"", timeout=20)
        await cancelled.read()
        cancelled.cancel()
        await failure(channel.unary_unary("/made.up/Name")(b""))
        late = raw.watch(b"", timeout=1.001)  # gRPC sends it rounded up: the end comes before it is due
        await late.read()
        await failure(late.read())
        await eventually(lambda: [counted(*end) for end in ends] == [count + 1 for count in ends_before])
    assert {kind: counted(kind) - before[kind] for kind in kinds} == dict.fromkeys(kinds, 1.0)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{serving.metrics_port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    page = await asyncio.to_thread(scrape)
    assert f'grpc_server_started_total{{grpc_method="UnaryUnary",grpc_service="{RAW}"}}' in page
    assert f'grpc_server_handling_seconds_count{{grpc_method="StreamUnary",grpc_service="{RAW}"}}' in page
    assert "made.up" not in page


async def test_a_blocked_event_loop_shows(serve: Serve) -> None:
    gc.collect()
    gc.disable()  # or it might be what blocks the loop
    try:
        for _ in range(10):  # a busy machine may block it as well
            serving = await serve()
            await asyncio.sleep(0.3)
            if serving.max_lag_s < 0.2:
                break
            serving.request_stop(now=True)
            await serving.wait()
        else:
            pytest.fail("a loop that nothing blocks shows as one that is blocked")
        time.sleep(0.4)  # noqa: ASYNC251  # the mistake to be seen
        await asyncio.sleep(0.2)
        assert 0.25 < serving.max_lag_s < 2
        assert prometheus_client.REGISTRY.get_sample_value("event_loop_lag_seconds") == serving.max_lag_s
    finally:
        gc.enable()


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        while True:
            try:
                self.heard.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_hears_of_ready_watchdog_and_stopping(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"{folder}/notify"
    systemd = Systemd(f"\0{name}" if abstract else name)
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    began = time.monotonic()
    serving: Serving = await serve()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ), (
        "children must not speak for us"
    )
    assert serving._notifier.watchdog_s == 0.2
    serving.status("loading")
    await eventually(lambda: systemd.listen().count("WATCHDOG=1") >= 3)
    serving.set_serving(RAW, True)
    assert "READY=1" not in systemd.listen()
    serving.set_serving(ENGINE, True)
    serving.set_serving(ENGINE, False)
    serving.set_serving(ENGINE, True)
    serving.request_stop()
    await serving.wait()
    heard = systemd.listen()
    systemd.close()
    assert heard.count("WATCHDOG=1") <= (time.monotonic() - began) / 0.1 + 2, "in half of its time each"
    assert [message for message in heard if message != "WATCHDOG=1"] == [
        "STATUS=loading",
        "READY=1",
        "STOPPING=1",
    ]


async def test_a_deaf_systemd_or_another_process_s_watchdog_does_no_harm(
    serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/nobody")
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    serving = await serve()
    assert serving._notifier.watchdog_s == 0
    serving.set_serving(ENGINE, True)
    serving.set_serving(RAW, True)


async def healthcheck(*arguments: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tandem.rpc.healthcheck", *arguments, stderr=subprocess.PIPE
    )
    _, errors = await child.communicate()
    assert child.returncode is not None
    return child.returncode, errors.decode()


async def test_the_healthcheck_speaks_by_exit_codes(serve: Serve, folder: Path) -> None:
    serving = await serve(token="right", addresses=(f"unix://{folder}/s", "127.0.0.1:0"))
    unix, tcp = serving.addresses
    results = await asyncio.gather(
        healthcheck(unix),
        healthcheck(tcp, ENGINE),
        healthcheck(unix, "no.such.Service"),
        healthcheck("unix:///no/such/socket"),
        healthcheck("nonsense"),
    )
    assert [code for code, _ in results] == [0, 1, 1, 3, 2]
    assert results[1][1].strip() == f"{tcp}: NOT_SERVING"
    serving.set_serving(ENGINE, True)
    assert await healthcheck(unix, ENGINE) == (0, "")


async def test_a_watcher_who_never_reads_holds_nothing_up(serve: Serve) -> None:
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(named(ENGINE))
        await watch.read()
        for _ in range(5000):
            serving.set_serving(ENGINE, True)
            await asyncio.sleep(0)
            serving.set_serving(ENGINE, False)
            await asyncio.sleep(0)
        serving.set_serving(ENGINE, True)
        assert (await stub.Check(named(ENGINE))).status == SERVING
        assert (
            await engine_pb2_grpc.EngineServiceStub(channel).GetStats(engine_pb2.GetStatsRequest())
        ).weight_version
