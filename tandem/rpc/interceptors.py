"""The outermost interceptor of every server: who may call, what errors become, and what is counted.

Handlers raise `tandem.errors`; they never call `context.abort`. A stream handler is an async generator.
However its RPC ends, it is closed before the RPC counts as over, so its `finally` runs at a known time.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog

from tandem.errors import (
    Internal,
    InvalidArgument,
    Reason,
    TandemError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from tandem.rpc import metrics
from tandem.rpc.status import to_status

Handler = Callable[[Any, Any], Any]

_log = structlog.get_logger("tandem.rpc")
_EXEMPT = "grpc.health.v1.Health"
_CANCEL_FOLLOWS_S = 1.0  # it takes some 0.1 ms
_BROKEN_S = (
    0.1  # as soon, but for a busy machine; who waits for it is a trainer that ends its stream between updates
)
_UNKNOWN = ("unknown", "unknown")  # as labels, names that callers make up would fill the memory


class _Malformed:
    """Stands for a request whose bytes are no message of its type."""


class Gate(grpc.aio.ServerInterceptor):
    """Checks the token, translates errors and counts, for all four kinds of RPC and for unknown methods."""

    def __init__(
        self,
        token: str | None = None,
        long_lived: Collection[str] = (),
        ending: asyncio.Event | None = None,
    ) -> None:
        """Make the interceptor.

        Args:
            token: what callers must send as `authorization: Bearer <token>`, but for health checks. None asks
                for nothing.
            long_lived: full names, `package.Service/Method`, of streams without an end of their own, which
                `drain` ends with status OK.
            ending: what `drain` sets.
        """
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._long_lived = frozenset(long_lived)
        self._ending = ending or asyncio.Event()
        self._running = _Running()

    def drain(self) -> None:
        """Refuse new RPCs but health checks, and end the long-lived streams, which would never end."""
        self._ending.set()

    async def idle(self) -> None:
        """Wait until no RPC is in a handler."""
        await self._running.none.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        full_name = handler_call_details.method.removeprefix("/")
        service, _, method = full_name.rpartition("/")
        handler = await continuation(handler_call_details)
        labels = _UNKNOWN if handler is None else (service, method)
        if not self._admits(service, handler_call_details.invocation_metadata):
            refusal = Unauthenticated(Reason.TOKEN_INVALID, "the bearer token is missing or wrong")
            return self._refuse(full_name, labels, refusal)
        if handler is None:
            unknown = Unimplemented(Reason.METHOD_UNKNOWN, f"there is no method {full_name} here")
            return self._refuse(full_name, labels, unknown)
        if self._ending.is_set() and service != _EXEMPT:
            return self._refuse(
                full_name, labels, Unavailable(Reason.DRAINING, "the service is shutting down")
            )
        behavior: Handler = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        ending = self._ending if full_name in self._long_lived else None
        call = _Call(full_name, labels, self._running, behavior, ending, streams_in=handler.request_streaming)
        make = (
            (grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler),
            (grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler),
        )[handler.request_streaming][handler.response_streaming]
        run: Handler = call.stream if handler.response_streaming else call.unary
        return make(run, _tolerant(handler.request_deserializer), handler.response_serializer)

    def _refuse(self, full_name: str, labels: tuple[str, str], error: TandemError) -> Any:
        """A handler that raises `error`, whatever kind of RPC the caller takes it for."""

        async def refuse(request: Any, context: Any) -> None:
            raise error

        return grpc.stream_stream_rpc_method_handler(_Call(full_name, labels, self._running, refuse).stream)

    def _admits(self, service: str, metadata: Any) -> bool:
        if self._expected is None or service == _EXEMPT:
            return True
        given = [value for key, value in metadata or () if key == "authorization"]
        raw = [value.encode() if isinstance(value, str) else value for value in given]
        return len(raw) == 1 and hmac.compare_digest(raw[0], self._expected)


class _Running:
    """Counts the RPCs that are in a handler."""

    def __init__(self) -> None:
        self._count = 0
        self.none = asyncio.Event()
        self.none.set()

    def __enter__(self) -> None:
        self._count += 1
        self.none.clear()

    def __exit__(self, *exc_info: object) -> None:
        self._count -= 1
        if self._count == 0:
            self.none.set()


class _Call:
    """One RPC on its way through a handler."""

    def __init__(
        self,
        name: str,
        labels: tuple[str, str],
        running: _Running,
        behavior: Handler,
        ending: asyncio.Event | None = None,
        streams_in: bool = False,
    ) -> None:
        self._name = name
        self._labels = labels
        self._running = running
        self._behavior = behavior
        self._ending = ending
        self._streams_in = streams_in

    async def unary(self, request: Any, context: Any) -> Any:
        """Handle an RPC with one response."""
        with self._running:
            return await self._guard(context, self._respond(request, context))

    async def stream(self, request: Any, context: Any) -> None:
        """Handle an RPC with a stream of responses.

        They are written from here: a generator around the handler's would be left for the garbage collector
        to close when the RPC is cancelled.
        """
        responses = self._respond_many(request, context)
        with self._running:
            await self._guard(context, responses if self._ending is None else _until(self._ending, responses))

    async def _respond(self, request: Any, context: Any) -> Any:
        return await self._behavior(self._checked(request), context)

    async def _respond_many(self, request: Any, context: Any) -> None:
        responses = self._behavior(self._checked(request), context)
        if inspect.isawaitable(responses):  # a handler that writes by itself, as libraries' do
            await responses
            return
        async with aclosing(responses):
            async for response in responses:
                try:
                    await context.write(response)
                except grpc.aio.InternalError:
                    # The RPC ended while the write was parked, and gRPC is about to cancel us. If the handler
                    # were closed before that, the cancel would cut its `finally` short.
                    await asyncio.sleep(_CANCEL_FOLLOWS_S)
                    raise

    def _checked(self, request: Any) -> Any:
        if self._streams_in:
            return _well_formed(request)
        _check(request)
        return request

    async def _guard(self, context: Any, work: Awaitable[Any]) -> Any:
        """Await the handler's work; end the RPC with the status of whatever it raises, and count."""
        structlog.contextvars.bind_contextvars(rpc=self._name)
        metrics.STARTED.labels(*self._labels).inc()
        begin, given = time.perf_counter(), context.time_remaining()
        code = grpc.StatusCode.UNKNOWN
        try:
            result = await work
            code = grpc.StatusCode.OK
            return result
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # by gRPC: it has answered, or the caller is gone
                code = _cancel_code(context, given)
                raise
            # Something inside was cancelled. gRPC would send nothing, and the caller wait for its deadline.
            code = grpc.StatusCode.UNAVAILABLE
            _log.warning("the work of an RPC was cancelled inside the service", exc_info=True)
            await self._abort(context, Unavailable(Reason.INTERRUPTED, "the service gave this call up"))
        except grpc.aio.AbortError:
            code = _status_code(context)
            raise
        except Exception as raised:  # noqa: BLE001  # whatever it is, its text must not leave
            error = self._as_error(raised, context)
            code = error.code
            await self._abort(context, error)
        finally:
            metrics.HANDLED.labels(*self._labels, code.name).inc()
            metrics.HANDLING.labels(*self._labels).observe(time.perf_counter() - begin)

    def _as_error(self, raised: Exception, context: Any) -> TandemError:
        if isinstance(raised, TandemError):
            return raised
        if isinstance(raised, NotImplementedError) and context.code() == grpc.StatusCode.UNIMPLEMENTED:
            # The generated servicer's stand-in for a method that was not written.
            return Unimplemented(Reason.METHOD_UNKNOWN, f"{self._name} is not implemented here")
        if isinstance(raised, ExceptionGroup):  # of an asyncio.TaskGroup
            known, unknown = raised.split(TandemError)
            if known is not None and unknown is None:
                return _first(known)
        incident = secrets.token_hex(6)
        _log.error("bug", incident=incident, exc_info=raised)
        message = f"a bug in the service; its log has the details under incident {incident}"
        return Internal(Reason.BUG, message, metadata={"incident": incident})

    async def _abort(self, context: Any, error: TandemError) -> NoReturn:
        status = to_status(error)
        try:
            await context.abort(status.code, status.details, status.trailing_metadata)
        except grpc.aio.UsageError:  # the handler aborted before and swallowed that; its status is sent
            raise grpc.aio.AbortError from error
        raise AssertionError("context.abort returned")


async def _until(ending: asyncio.Event, work: Awaitable[None]) -> None:
    """Await `work`, or cancel it when `ending` is set and return once it is over."""
    doing = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ending.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            await doing
    finally:
        waiting.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait({doing})
        if not doing.cancelled() and (error := doing.exception()) is not None and ending.is_set():
            _log.warning("a stream failed while it was ended", exc_info=error)


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """What a deserializer raises, gRPC would send to the caller as it is, before our handler runs."""
    if deserialize is None:
        return None

    def attempt(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception:  # noqa: BLE001  # of whatever library made it
            return _Malformed()

    return attempt


def _check(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise InvalidArgument(Reason.FIELD_INVALID, "the bytes are no message of the request's type")


async def _well_formed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Check each request, and tell a broken stream from one that its caller ended.

    gRPC shows both as the end of the requests; of a broken one it cancels the handler a moment later.
    """
    async for request in requests:
        _check(request)
        yield request
    await asyncio.sleep(_BROKEN_S)


def _first(group: BaseExceptionGroup[TandemError]) -> TandemError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _cancel_code(context: Any, given: float | None) -> grpc.StatusCode:
    left = context.time_remaining()
    if left is None or given is None:
        return grpc.StatusCode.CANCELLED
    # The caller ends its RPC at the deadline itself, which gRPC told us rounded up by as much as a hundredth.
    late = left <= 0.01 * given + 0.01
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def _status_code(context: Any) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN)
