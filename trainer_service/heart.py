"""The heartbeats of all leases of this process, from one thread: starting one takes as long as a message."""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

_LINGER_S = 60.0  # for which the thread keeps ticking: the next lease then need not wake it


class Beating(Protocol):
    """What is kept alive."""

    def beat(self) -> None:
        """Say so. Must not block."""


class Heart:
    """Calls `beat` of each lease, as often as that needs it. The thread starts with the first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._leases: dict[Beating, tuple[float, float]] = {}  # seconds between two, and when the next is due
        self._wakes = 0.0  # when the thread looks next; 0 while it sleeps until it is woken
        self._pid = 0

    def add(self, lease: Beating, every_s: float) -> None:
        """Have `lease` beat from now on."""
        due = time.monotonic() + every_s
        with self._changed:
            self._leases[lease] = (every_s, due)
            if self._pid != os.getpid():  # the first, or forked away from the thread
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="tandem-heart", daemon=True).start()
            elif not self._wakes or self._wakes > due:
                self._changed.notify()

    def remove(self, lease: Beating) -> None:
        """Have it beat no more."""
        with self._changed:
            self._leases.pop(lease, None)

    def _run(self) -> None:
        tick, idle_since = _LINGER_S, time.monotonic()
        while True:
            with self._changed:
                now = time.monotonic()
                if self._leases:
                    idle_since = now
                    tick = min(tick, *(every for every, _ in self._leases.values()))
                idle = now - idle_since > _LINGER_S
                until = min([now + tick, *(due for _, due in self._leases.values())])
                self._wakes = 0.0 if idle else until
                self._changed.wait(None if idle else max(until - now, 0.0))
                now = time.monotonic()
                beating = [lease for lease, (_, due) in self._leases.items() if due <= now]
                for lease in beating:
                    every = self._leases[lease][0]
                    self._leases[lease] = (every, now + every)
            for lease in beating:
                lease.beat()


HEART = Heart()
