"""Generation stopped and the workers' kernels done, in the time of one call to the engine's process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
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
