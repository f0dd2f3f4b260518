"""The trainer's side of an UpdateWeights stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from tandem.errors import Aborted, FailedPrecondition, Reason, Unavailable
from tandem.weights.v1 import weights_pb2 as pb

_TICKS = 8
T = TypeVar("T")


class Trainer:
    """Its messages, and whether it is still there."""

    def __init__(self, messages: AsyncIterator[pb.UpdateWeightsRequest], timeout: float) -> None:
        self._messages = aiter(messages)
        self._timeout = timeout
        self._coming: asyncio.Future[Any] | None = None
        self._gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def has_gone(self) -> str:
        """Why it will say nothing more; "" as far as is known."""
        return str(self._gone.result()) if self._gone.done() and not self._gone.cancelled() else ""

    async def again(self, ending: asyncio.Event) -> pb.UpdateWeightsRequest | None:
        """What the next update begins with, however long that takes: nothing is held. None if none comes.

        Raises:
            Unavailable: DRAINING, once `ending` is set.
        """
        self._gone.cancel()  # what was told of the last update
        self._gone = asyncio.get_running_loop().create_future()
        over = asyncio.ensure_future(ending.wait())
        try:
            while True:
                coming = self._coming = self._coming or asyncio.ensure_future(anext(self._messages, None))
                await asyncio.wait({coming, over}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise Unavailable(Reason.DRAINING, "the service is shutting down")
                self._coming, message = None, coming.result()
                if message is None or message.WhichOneof("step") != "heartbeat":  # a late one of the last
                    return cast("pb.UpdateWeightsRequest | None", message)
        finally:
            over.cancel()

    def gone(self, reason: str) -> None:
        if not self._gone.done():
            self._gone.set_result(reason)

    async def next(self) -> pb.UpdateWeightsRequest:
        """The next message.

        Raises:
            Aborted: LEASE_LOST, the trainer was silent for too long, ended the stream, or closed its session.
        """
        message = await self._next()
        assert message is not None  # noqa: S101  for the type checker
        return message

    async def _next(self, until: asyncio.Future[Any] | None = None) -> pb.UpdateWeightsRequest | None:
        """The next message; None once `until` is done, where the message is the next call's. Raises as `next`."""
        others = {self._gone} if until is None else {self._gone, until}
        # In ticks: a loop that was stalled itself may not blame the trainer for the time.
        for _ in range(_TICKS):
            coming = self._coming = self._coming or asyncio.ensure_future(anext(self._messages, None))
            await asyncio.wait(
                {coming, *others}, timeout=self._timeout / _TICKS, return_when=asyncio.FIRST_COMPLETED
            )
            if until is not None and until.done():
                return None
            if coming.done() and (message := coming.result()) is not None:
                self._coming = None
                return cast(pb.UpdateWeightsRequest, message)
            if coming.done() or self._gone.done():
                reason = self._gone.result() if self._gone.done() else "the trainer ended its update's stream"
                raise Aborted(Reason.LEASE_LOST, reason)
        raise Aborted(Reason.LEASE_LOST, f"nothing was heard of the trainer for {self._timeout:g} s")

    async def heard_during(
        self, work: Coroutine[Any, Any, T], undo: Callable[[T, BaseException], Awaitable[None]] | None = None
    ) -> T:
        """Await `work`, in which the trainer has nothing to say but that it is there, or that it gives up.

        Raises as `next` does: `work` is cancelled then, and where that comes too late `undo` is given its result, which
        nobody else has. FailedPrecondition: UPDATE_ORDER.
        """
        working = asyncio.ensure_future(work)
        try:
            while (message := await self._next(working)) is not None:
                if (step := message.WhichOneof("step")) == "abort":
                    raise Aborted(Reason.LEASE_LOST, message.abort.reason or "the trainer gave up")
                if step != "heartbeat":
                    what = f"{step or 'an empty step'} while the service has to answer"
                    raise FailedPrecondition(Reason.UPDATE_ORDER, what)
            return working.result()
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(_ended(working, error, undo)))
            raise

    def close(self) -> None:
        self._gone.cancel()
        if self._coming is not None:
            self._coming.cancel()


async def _ended(
    working: asyncio.Future[T],
    why: BaseException,
    undo: Callable[[T, BaseException], Awaitable[None]] | None,
) -> None:
    """Cancel it, or undo what it did already."""
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
    if undo is not None and not working.cancelled() and working.exception() is None:
        await undo(working.result(), why)
