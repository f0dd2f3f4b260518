"""Generation stopped in as few round trips to the engine's process as can be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

_SETTLE = "tandem_settle"


async def halted(llm: Any, pausing: Coroutine[Any, Any, None], timeout_s: float) -> None:
    """Do `pausing`, a call that pauses the engine's scheduler, and wait for every kernel of its workers.

    Both calls are sent at once, as the engine's process does what it is told in order. Where a step was still running,
    the pause is answered only after it, and thus last: then the workers are asked anew.
    """
    order: list[asyncio.Future[Any]] = []
    calls = [
        asyncio.ensure_future(call) for call in (pausing, llm.collective_rpc(_SETTLE, timeout=timeout_s))
    ]
    for call in calls:
        call.add_done_callback(order.append)
    try:
        await asyncio.gather(*calls)
    except BaseException:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        raise
    if order[0] is not calls[0]:
        await llm.collective_rpc(_SETTLE, timeout=timeout_s)


class Rest:
    """Knows whether the engine has had nothing to do since it was last seen to stand still.

    Then whoever wants it stopped need not wait for it: the message that stops it arrives before any request that
    comes later.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._stirred = 0
        self._since: int | None = None  # how often it had been stirred when it stood still
        self._settled = False  # and whether its kernels were done
        core = llm.engine_core
        add: Callable[[Any], Any] | None = getattr(core, "add_request_async", None)
        if add is not None:  # the one way on which requests reach the engine's process

            async def adding(request: Any) -> None:
                self.stir()
                await add(request)

            core.add_request_async = adding

    def stir(self) -> int:
        """The engine is given work. Returns how often it was."""
        self._stirred += 1
        return self._stirred

    @property
    def stirred(self) -> int:
        """How often it was given work."""
        return self._stirred

    def began(self, stirred: int, *, settled: bool) -> None:
        """It stood still, with its kernels done if `settled`, after it had been asked to when `stirred` was that."""
        if stirred == self._stirred:
            settled = settled or (self._settled and self._since == stirred)
            self._since, self._settled = stirred, settled

    def lasts(self, *, settled: bool) -> bool:
        """Whether it still does."""
        if self._since != self._stirred or (settled and not self._settled):
            return False
        return not self._llm.output_processor.get_num_unfinished_requests()
