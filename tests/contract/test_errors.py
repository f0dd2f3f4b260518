"""What the service raises is what the client gets: no more, no less, and at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from conftest import Serve, failure
from engine import ENGINE, RAW, Raw, ScriptedEngine
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc
from tandem.errors import CATALOGUE, Internal, InvalidArgument, Reason, TandemError, Violation, invalid
from tandem.rpc import connect, connect_aio, to_status, translate, translated
from tandem.rpc.status import DETAILS_KEY

PAUSE = engine_pb2.PauseRequest()


def specimen(reason: Reason) -> TandemError:
    return CATALOGUE[reason](
        reason,
        f"größer than {reason}",
        violations=[Violation("sampling.top_p", "must be in (0, 1]"), Violation("model.0.weight", "é")],
        metadata={"weight_version": "3", "why": "ü"},
        retry_after=1.5,
    )


def same(got: TandemError, sent: TandemError) -> bool:
    def parts(error: TandemError) -> tuple[object, ...]:
        return (
            type(error),
            error.reason,
            error.message,
            error.violations,
            error.metadata,
            error.retry_after,
            error.code,
        )

    return parts(got) == parts(sent)


@pytest.mark.parametrize("reason", Reason)
async def test_every_reason_crosses_the_wire_whole(
    serve: Serve, engine: ScriptedEngine, reason: Reason
) -> None:
    async def pause(request: Any, context: Any) -> None:
        raise specimen(reason)

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        with pytest.raises(CATALOGUE[reason]) as caught, translated():
            await engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE, timeout=5)
    assert same(caught.value, specimen(reason))
    assert isinstance(caught.value.__cause__, grpc.RpcError)

    def call() -> None:
        with connect(serving.addresses[0]) as channel, translated():
            engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE, timeout=5)

    with pytest.raises(CATALOGUE[reason]) as sync_caught:
        await asyncio.to_thread(call)
    assert same(sync_caught.value, specimen(reason))


@pytest.mark.parametrize("reason", Reason)
def test_errors_survive_pickling_and_are_builtin_errors(reason: Reason) -> None:
    error = specimen(reason)
    assert same(pickle.loads(pickle.dumps(error)), error)  # noqa: S301  # our own
    assert [base for base in type(error).__bases__ if base.__module__ == "builtins"]
    assert str(error).startswith(f"{reason}: größer")


def test_a_reason_is_refused_outside_its_class() -> None:
    with pytest.raises(TypeError, match="FIELD_INVALID is a reason of InvalidArgument"):
        Internal(Reason.FIELD_INVALID, "no")


async def test_many_violations_fit_the_trailers_and_the_rest_is_counted(
    serve: Serve, engine: ScriptedEngine
) -> None:
    async def pause(request: Any, context: Any) -> None:
        violations = [
            Violation(f"layers.{i}.größe", "shape (2, 3), the engine has (3, 2)") for i in range(5000)
        ]
        raise InvalidArgument(Reason.MANIFEST_MISMATCH, "ß" * 5000, violations=violations)

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        error = await failure(engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE))
    # What a strict peer counts: 8 KiB with base64, and the message with each non-ASCII byte as three.
    details = dict(error.trailing_metadata() or ())[DETAILS_KEY]
    assert len(details) * 4 / 3 + 3 * len((error.details() or "").encode()) < 8000
    got = translate(error)
    assert got.reason is Reason.MANIFEST_MISMATCH
    listed = len(got.violations) - 1
    assert listed > 20
    assert got.violations[-1] == Violation("...", f"and {5000 - listed} more")
    assert got.message.endswith("...")


def test_details_follow_google_rpc() -> None:
    _, _, ((_, raw),) = to_status(CATALOGUE[Reason.LORA_OFF](Reason.LORA_OFF, "it is off"))
    details = {d.TypeName(): d for d in status_pb2.Status.FromString(raw).details}
    assert set(details) == {"google.rpc.ErrorInfo", "google.rpc.PreconditionFailure"}
    info = error_details_pb2.ErrorInfo()
    details["google.rpc.ErrorInfo"].Unpack(info)
    assert (info.reason, info.domain) == ("LORA_OFF", "tandem")


async def test_the_text_of_a_bug_stays_in_the_log(serve: Serve, engine: ScriptedEngine) -> None:
    async def pause(request: Any, context: Any) -> None:
        raise ValueError("/secret/path")

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        with capture_logs() as logs:
            error = await failure(engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE))
    assert "secret" not in repr((error.details(), error.trailing_metadata(), error.debug_error_string()))
    got = translate(error)
    assert (type(got), got.reason) == (Internal, Reason.BUG)
    (bug,) = [entry for entry in logs if entry["event"] == "bug"]
    assert bug["incident"] == got.metadata["incident"]
    assert got.metadata["incident"] in got.message
    assert "secret" in str(bug["exc_info"])


async def test_without_the_gate_grpc_sends_the_text_and_drops_inner_cancels(folder: Any) -> None:
    """The two traps themselves. If this fails, gRPC got better, and so can we."""

    async def leak(request: bytes, context: Any) -> bytes:
        raise ValueError("/secret/path")

    async def drop(request: bytes, context: Any) -> bytes:
        raise asyncio.CancelledError

    server = grpc.aio.server()
    handlers = {
        "Leak": grpc.unary_unary_rpc_method_handler(leak),
        "Drop": grpc.unary_unary_rpc_method_handler(drop),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Service", handlers),))
    server.add_insecure_port(f"unix://{folder}/bare")
    await server.start()
    async with connect_aio(f"unix://{folder}/bare") as channel:
        leaked = await failure(channel.unary_unary("/bare.Service/Leak")(b""))
        assert "/secret/path" in (leaked.details() or "")
        dropped = await failure(channel.unary_unary("/bare.Service/Drop")(b"", timeout=0.5))
        assert dropped.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await server.stop(None)


@pytest.mark.parametrize("kind", ["unary", "stream"])
@pytest.mark.usefixtures("quiet")
async def test_an_inner_cancel_is_answered_at_once(serve: Serve, engine: ScriptedEngine, kind: str) -> None:
    async def cancelled_inside() -> None:
        inner = asyncio.ensure_future(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    async def unary(request: bytes, context: Any) -> bytes:
        await cancelled_inside()
        return b""

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        await cancelled_inside()

    engine.unary_unary, engine.unary_stream = unary, stream
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        raw = Raw(channel)
        if kind == "unary":
            error = await failure(raw.unary_unary(b""), limit_s=2)
        else:
            call = raw.unary_stream(b"")
            assert await call.read() == b"one"
            error = await failure(call.read(), limit_s=2)
    got = translate(error)
    assert (got.code, got.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.INTERRUPTED)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("where", ["in the handler", "parked in a write"])
async def test_a_real_cancel_closes_the_generator_before_the_rpc_counts_as_over(
    serve: Serve, engine: ScriptedEngine, how: str, where: str
) -> None:
    closed = asyncio.Event()
    entered = asyncio.Event()

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            entered.set()
            while True:
                if where == "in the handler":
                    await asyncio.sleep(60)
                yield bytes(2**20)
        finally:
            await asyncio.sleep(0.01)  # an engine's abort takes a moment
            closed.set()

    engine.unary_stream = stream
    serving = await serve()
    gc.collect()
    gc.disable()  # or the collector might do what the gate must
    try:
        async with connect_aio(serving.addresses[0]) as channel:
            call = Raw(channel).unary_stream(b"", timeout=1 if how == "deadline" else None)
            await entered.wait()
            await asyncio.sleep(0.3)  # for the window to fill
            if how == "cancel":
                call.cancel()
            await asyncio.wait_for(closed.wait(), 3)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["cancel", "deadline", "close", "done"])
async def test_a_broken_request_stream_is_not_taken_for_an_ended_one(
    serve: Serve, engine: ScriptedEngine, how: str
) -> None:
    """gRPC ends the requests in both cases; an update must not read a lost trainer as a finished one."""
    ends: list[str] = []
    over = asyncio.Event()

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async for request in requests:
                yield request
            ends.append("ended")
        except asyncio.CancelledError:
            ends.append("broken")
            raise
        finally:
            await asyncio.sleep(0.01)
            ends.append("cleaned up")
            over.set()

    engine.stream_stream = stream
    serving = await serve()
    channel = connect_aio(serving.addresses[0])
    call = Raw(channel).stream_stream(timeout=1.0 if how == "deadline" else None)
    await call.write(b"begin")
    assert await call.read() == b"begin"
    if how == "cancel":
        call.cancel()
    elif how == "close":
        await channel.close()
    elif how == "done":
        await call.done_writing()
    await asyncio.wait_for(over.wait(), 3)
    assert ends == ["ended" if how == "done" else "broken", "cleaned up"]
    await channel.close()


async def test_the_first_abort_wins(serve: Serve, engine: ScriptedEngine) -> None:
    async def pause(request: Any, context: Any) -> None:
        with contextlib.suppress(Exception):  # the mistake: AbortError is an Exception
            await context.abort(grpc.StatusCode.NOT_FOUND, "first")
        raise invalid("mode", "second")

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        error = await failure(engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE))
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "first")


async def test_an_error_in_a_task_group_is_that_error(serve: Serve, engine: ScriptedEngine) -> None:
    async def fail() -> None:
        raise invalid("mode", "in a group")

    async def pause(request: Any, context: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        error = await failure(engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE))
    assert translate(error).message == "mode: in a group"


async def test_an_error_after_some_responses_arrives_after_them(serve: Serve, engine: ScriptedEngine) -> None:
    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request.upper()
        raise invalid("step", "the stream ended before commit")

    engine.stream_stream = stream
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        call = Raw(channel).stream_stream(iter([b"a", b"b"]))
        assert [await call.read(), await call.read()] == [b"A", b"B"]
        assert translate(await failure(call.read())).violations[0].field == "step"


async def test_bytes_that_are_no_message_are_the_callers_mistake(
    serve: Serve, engine: ScriptedEngine
) -> None:
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        error = await failure(channel.unary_unary(f"/{ENGINE}/Pause")(b"\xff\xff\xff"))
    assert translate(error).reason is Reason.FIELD_INVALID


@pytest.mark.parametrize(
    "method", [f"/{ENGINE}/WakeUp", f"/{ENGINE}/Nope", "/no.Such/Method", f"/{RAW}/Nope"]
)
async def test_an_unknown_method_is_an_error_like_any_other(serve: Serve, method: str) -> None:
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        error = translate(await failure(channel.unary_unary(method)(b"")))
        streamed = translate(await failure(channel.stream_stream(method)(iter([b""])).read()))
    for got in (error, streamed) if not method.endswith("WakeUp") else (error,):
        assert (got.code, got.reason) == (grpc.StatusCode.UNIMPLEMENTED, Reason.METHOD_UNKNOWN)


async def test_what_grpc_itself_says_is_translated_too(
    serve: Serve, engine: ScriptedEngine, folder: Any
) -> None:
    async def pause(request: Any, context: Any) -> None:
        await asyncio.sleep(60)

    engine.pause = pause
    serving = await serve()
    async with connect_aio(serving.addresses[0]) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        with pytest.raises(TimeoutError) as late, translated():
            await stub.Pause(PAUSE, timeout=0.2)
    assert late.value.reason is Reason.DEADLINE  # type: ignore[attr-defined]
    async with connect_aio(f"unix://{folder}/nobody") as channel:
        with pytest.raises(ConnectionError) as gone, translated():
            await engine_pb2_grpc.EngineServiceStub(channel).Pause(PAUSE, timeout=5)
    assert gone.value.reason is Reason.UNREACHABLE  # type: ignore[attr-defined]


class Bare(grpc.RpcError):
    """A failed call as a peer of another version could cause it."""

    def __init__(self, code: grpc.StatusCode, raw: bytes | None = None) -> None:
        self._code, self._raw = code, raw

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "words"

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        return [] if self._raw is None else [(DETAILS_KEY, self._raw)]


def test_unknown_reasons_and_broken_details_still_translate() -> None:
    newer = to_status(InvalidArgument("BORN_LATER", "from the future", metadata={"a": "b"}))
    got = translate(Bare(grpc.StatusCode.INVALID_ARGUMENT, newer.trailing_metadata[0][1]))
    assert (type(got), got.reason, got.metadata) == (InvalidArgument, "BORN_LATER", {"a": "b"})
    assert translate(Bare(grpc.StatusCode.UNAVAILABLE, b"\xff\xff")).reason is Reason.UNREACHABLE
    assert translate(Bare(grpc.StatusCode.OUT_OF_RANGE)).reason is Reason.BUG
    assert translate(grpc.RpcError("closed channel")).message == "closed channel"
