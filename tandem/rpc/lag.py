"""How late the event loop is. A handler that blocks the loop stops every RPC; this shows it."""

from __future__ import annotations

import asyncio
from collections import deque

from tandem.rpc import metrics

INTERVAL_S = 0.1
WINDOW_S = 10.0


class LagMonitor:
    """Measures by sleeping and looking at the clock."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=round(WINDOW_S / INTERVAL_S))

    @property
    def max_s(self) -> float:
        """The longest that the loop was late in the last ten seconds, in seconds."""
        return max(self._samples, default=0.0)

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self._samples.append(max(0.0, loop.time() - due))
            metrics.LOOP_LAG.set(self.max_s)
