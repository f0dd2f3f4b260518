"""Channel arguments do what they are set for. gRPC ignores what it does not know, so each is proved."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Serve, failure
from engine import RAW, Raw, ScriptedEngine
from grpc._cython import cygrpc

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import Reason, ResourceExhausted, Unavailable
from tandem.rpc import Serving, connect_aio, options, translate

MIB = 2**20


def names() -> list[str]:
    return sorted({name for name, _ in [*options.server_options(), *options.client_options()]})


def known_to_grpc(name: str) -> bool:
    """Whether the string is in gRPC's binary, whole from its begin on and ended there."""
    return f"{name}\0".encode() in Path(cygrpc.__file__).read_bytes()


def test_grpc_knows_every_argument() -> None:
    assert [name for name in names() if not known_to_grpc(name)] == []


def test_grpc_does_not_know_the_name_that_others_used() -> None:
    assert not known_to_grpc("grpc.http2.min_recv_ping_interval_without_data_ms")


def test_every_argument_is_named_and_set_in_one_module() -> None:
    root = Path(options.__file__).parents[2]
    sources = [
        path
        for package in ("tandem", "inference_service", "trainer_service", "weight_transfer")
        for path in (root / package).rglob("*.py")
        if "_pb2" not in path.name and path != Path(options.__file__)
    ]
    assert len(sources) > 10
    argument = re.compile(r"""["']grpc\.(?!health|reflection)[a-z0-9_.]+["']""")
    assert [str(path) for path in sources if argument.search(path.read_text())] == []


async def silent_call(server_options: list[tuple[str, Any]], seconds: float = 8) -> bytes | grpc.RpcError:
    """A unary call in which nothing is sent for `seconds`, of a client that pings every 300 ms."""

    async def quiet(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(seconds)
        return b"done"

    server = grpc.aio.server(options=server_options)
    handler = grpc.unary_unary_rpc_method_handler(quiet)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RAW, {"UnaryUnary": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connect_aio(f"127.0.0.1:{port}", extra_options=[(options.KEEPALIVE_TIME, 300)]) as channel:
            return bytes(await Raw(channel).unary_unary(b"", timeout=seconds + 5))
    except grpc.RpcError as error:
        return error
    finally:
        await server.stop(None)


async def test_a_long_silent_call_survives_its_clients_pings() -> None:
    """Strikes are off, which hides whether the interval is right: so also with strikes and a small interval.

    The third is the trap, and the proof that the clients ping at all.
    """
    interval = [(options.MIN_PING_INTERVAL, 200), (options.MAX_PING_STRIKES, 2)]
    ours, strict, wrong = await asyncio.gather(
        silent_call(options.server_options()),
        silent_call(options.merge(options.server_options(), interval)),
        silent_call([("grpc.http2.min_recv_ping_interval_without_data_ms", 200)]),
    )
    assert (ours, strict) == (b"done", b"done")
    assert isinstance(wrong, grpc.aio.AioRpcError)
    assert wrong.code() == grpc.StatusCode.UNAVAILABLE
    assert "pings" in (wrong.details() or "")


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def double(request: bytes, context: Any) -> bytes:
    return request * 2


async def test_a_message_over_grpcs_own_limit_passes(serve: Serve, engine: ScriptedEngine) -> None:
    engine.unary_unary = echo
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        assert len(await Raw(channel).unary_unary(bytes(15 * MIB))) == 15 * MIB


@pytest.mark.parametrize("side", ["server receives", "server sends", "client sends", "client receives"])
async def test_a_message_over_the_limit_is_refused(serve: Serve, engine: ScriptedEngine, side: str) -> None:
    engine.unary_unary = echo if side.endswith("receives") and side.startswith("server") else double
    small, large = MIB, 8 * MIB
    serving = await serve(max_message_bytes=small if side.startswith("server") else large)
    limit = small if side.startswith("client") else large
    size = 700_000 if side in ("server sends", "client receives") else 2 * MIB
    async with connect_aio(serving.addresses[0], max_message_bytes=limit) as channel:
        error = translate(await failure(Raw(channel).unary_unary(bytes(size))))
        assert (type(error), error.reason) == (ResourceExhausted, Reason.MESSAGE_TOO_LARGE)
        engine.unary_unary = echo
        assert await Raw(channel).unary_unary(b"still here") == b"still here"


async def test_a_slow_reader_parks_the_handler(serve: Serve, engine: ScriptedEngine) -> None:
    """So nothing piles up between handler and client, and a handler must not let it pile up behind itself."""
    written = 0
    chunk = bytes(65536)

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal written
        for _ in range(1000):
            yield chunk
            written += 1

    engine.unary_stream = stream
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        call = Raw(channel).unary_stream(b"")
        assert await call.read() == chunk
        parked = -1
        async with asyncio.timeout(5):
            while written != parked:
                parked = written
                await asyncio.sleep(0.5)
        assert parked * len(chunk) < 16 * MIB
        received = 1
        while await call.read() is not grpc.aio.EOF:
            received += 1
        assert received == 1000


async def test_reads_are_tried_again_and_writes_are_not(serve: Serve, engine: ScriptedEngine) -> None:
    calls = {"read": 0, "write": 0}

    async def get_stats(request: Any, context: Any) -> engine_pb2.GetStatsResponse:
        calls["read"] += 1
        if calls["read"] < 3:
            raise Unavailable(Reason.ENGINE_LOADING, "soon")
        return engine_pb2.GetStatsResponse(weight_version=5)

    async def pause(request: Any, context: Any) -> None:
        calls["write"] += 1
        raise Unavailable(Reason.ENGINE_LOADING, "soon")

    engine.get_stats, engine.pause = get_stats, pause  # type: ignore[method-assign]
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        assert (await stub.GetStats(engine_pb2.GetStatsRequest())).weight_version == 5
        assert translate(await failure(stub.Pause(engine_pb2.PauseRequest()))).reason is Reason.ENGINE_LOADING
    assert calls == {"read": 3, "write": 1}


def test_what_is_tried_again_is_in_the_contract() -> None:
    """A misspelt method in the service config would be ignored."""
    from tandem.inference.v1 import inference_pb2
    from tandem.trainer.v1 import trainer_pb2
    from tandem.weights.v1 import weights_pb2

    methods = {
        (service.full_name, method.name)
        for module in (engine_pb2, inference_pb2, trainer_pb2, weights_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    for service, named in options._READS.items():
        assert {(service, name) for name in named} <= methods


async def test_a_call_is_not_made_twice_at_once(serve: Serve, engine: ScriptedEngine) -> None:
    """Hedging would do that where the first answer is late. This gRPC knows the word and does nothing."""
    calls = 0

    async def slow(request: bytes, context: Any) -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.5)
        return b"done"

    engine.unary_unary = slow
    hedging = {
        "methodConfig": [
            {"name": [{"service": RAW}], "hedgingPolicy": {"maxAttempts": 3, "hedgingDelay": "0.05s"}}
        ]
    }
    serving = await serve()
    asked = [(options.SERVICE_CONFIG, json.dumps(hedging))]
    async with connect_aio(serving.addresses[0], extra_options=asked) as channel:
        assert await Raw(channel).unary_unary(b"") == b"done"
    assert calls == 1
    assert "hedgingPolicy" not in options.service_config()


def test_systemd_hands_over_no_socket() -> None:
    """gRPC's own code for it is not in this build, so units must not rely on socket activation."""
    assert b"LISTEN_FDS" not in Path(cygrpc.__file__).read_bytes()
    assert b"GRPC_VERBOSITY" in Path(cygrpc.__file__).read_bytes()  # as other variables are


async def test_a_channel_finds_a_restarted_server(serve: Serve) -> None:
    took: list[float] = []
    while len(took) < 3 and min(took, default=0.6) >= 0.6:  # a busy machine may be late
        serving: Serving = await serve()
        async with connect_aio(serving.addresses[0]) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            await stub.GetStats(engine_pb2.GetStatsRequest())
            await ended(serving)
            error = translate(await failure(stub.Pause(engine_pb2.PauseRequest())))
            assert error.reason is Reason.UNREACHABLE
            serving = await serve()
            begin = time.monotonic()
            await stub.GetStats(engine_pb2.GetStatsRequest(), wait_for_ready=True, timeout=10)
            took.append(time.monotonic() - begin)
        await ended(serving)
    assert min(took) < 0.6  # by gRPC's own backoff 0.8 at least, each time


async def ended(serving: Serving) -> None:
    serving.request_stop(now=True)
    await serving.wait()


async def test_a_proxy_for_the_web_is_not_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    serving = await serve(addresses=("127.0.0.1:0",), insecure=True)
    async with connect_aio(serving.addresses[0]) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        assert (await stub.GetStats(engine_pb2.GetStatsRequest(), timeout=5)).reason == "it works"
    async with grpc.aio.insecure_channel(serving.addresses[0]) as channel:  # that it would have been
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        assert (
            await failure(stub.GetStats(engine_pb2.GetStatsRequest()))
        ).code() == grpc.StatusCode.UNAVAILABLE
