"""Both services on this host, as children of this program."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tandem.errors import DeadlineExceeded, Reason
from tandem.processes import Child, ChildError, Processes

_ASK_EVERY_S = 0.5


class Pair:
    """The inference service and the trainer service. They end with `processes`; jobs do not: see `up`."""

    def __init__(
        self,
        processes: Processes,
        addresses: Mapping[str, str],
        *,
        inference: Mapping[str, Any],
        trainer: Mapping[str, Any],
    ) -> None:
        """Start them.

        Args:
            processes: what their lives are tied to.
            addresses: where `inference` and `trainer` serve.
            inference: further flags of the one, as `Processes.start` takes them.
            trainer: of the other.
        """
        self._processes, self._addresses = processes, dict(addresses)
        flags = {"inference": inference, "trainer": trainer}
        self._children: dict[str, Child] = {
            name: processes.start(name, f"{name}_service", addresses=addresses[name], **flags[name])
            for name in flags
        }

    def wait_until_serving(self, timeout_s: float) -> None:
        """Wait until both have loaded.

        Raises:
            Interrupted, ChildError: as `wait`.
            DeadlineExceeded: it took longer than `timeout_s`.
        """
        from tandem.cli.health import health  # loaded now that the children run

        deadline, asked = time.monotonic() + timeout_s, 0.0
        waiting = dict(self._addresses)
        while waiting:
            self.wait()
            now = time.monotonic()
            if now - asked > _ASK_EVERY_S:
                asked = now
                waiting = {name: place for name, place in waiting.items() if health(place, name) != "SERVING"}
            if waiting and now > deadline:
                late = f"{' and '.join(waiting)} did not serve within {timeout_s:.0f} s"
                raise DeadlineExceeded(Reason.DEADLINE, late)

    def wait(self) -> None:
        """Wait for a moment.

        Raises:
            Interrupted: this program has been told to end.
            ChildError: one of the services has ended.
        """
        self._processes.wait()
        for name, child in self._children.items():
            if child.ended():
                raise ChildError(f"the {name} service ended by itself")
