"""The thread in an engine's worker that receives new weights by NCCL, as the service's Link tells it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from inference_service.receiving import Crew, Receiving
from weight_transfer.cuda.nccl import own_stream

if TYPE_CHECKING:
    from inference_service.loader import HeldWeights

_BEAT_S = 0.25
_CONNECT_S = 10.0
_IDLE_S = 30.0  # after which memory that only updates need is given back


class _EndedError(Exception):
    """The order was taken back."""


class _GoneError(Exception):
    """The service has let go, or is gone."""


class WorkerLink:
    """Carries out one order after the other. `abort` takes back the one under way; it and `drop` are not answered."""

    def __init__(
        self, held: HeldWeights, path: str, before: WorkerLink | None = None, crew: Crew | None = None
    ) -> None:
        """Connect to the service's socket at `path`, and begin once the link before has ended, as it does by itself."""
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._line.settimeout(_CONNECT_S)
        self._line.connect(path)
        self._read = b""
        self._orders: list[dict[str, Any]] = []
        self._beaten = 0.0
        self._receiving = Receiving(held, self._pulse, crew or Crew())
        self._device = held.arenas[0].device
        self._before = before
        self._thread = threading.Thread(target=self._run, name="tandem-link", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            # Memory and communicator of the last are given back first: NCCL does not join while it aborts.
            while self._before is not None and self._before._thread.is_alive():
                with contextlib.suppress(_EndedError):
                    self._pulse()
                self._before._thread.join(_BEAT_S / 2)
            self._before = None
            with own_stream(self._device):
                while True:
                    self._carry_out(self._next())
        except _GoneError:
            return
        finally:
            self._receiving.close()
            self._line.close()

    def _carry_out(self, order: dict[str, Any]) -> None:
        try:
            match order["do"]:
                case "join":
                    found = self._receiving.join(bytes.fromhex(order["id"]), **_how(order))
                case "receive":
                    found = self._receiving.receive(**_how(order))
                case "changes":
                    found = self._receiving.changes(**_how(order))
                case "install":
                    found = self._receiving.install()
                case "abort":
                    self._receiving.leave()
                    return
                case "drop":
                    self._receiving.drop()
                    return
                case other:
                    raise RuntimeError(f"no order is called {other!r}")
        except _EndedError:
            self._receiving.leave()
            found = {"error": "the update has ended"}
        except _GoneError:
            raise
        except Exception as error:  # noqa: BLE001  # told
            self._receiving.leave()
            found = {"error": f"{type(error).__name__}: {error}"}
        self._say({"order": order["order"], **found})

    def _next(self) -> dict[str, Any]:
        while not self._orders:
            if not self._hear(_IDLE_S):
                self._receiving.rest()
        return self._orders.pop(0)

    def _pulse(self) -> None:
        """Say that this process is there, and look for an order that takes back what came before it."""
        if time.monotonic() - self._beaten > _BEAT_S:
            self._say({})
        self._hear(0)
        aborts = [i for i, order in enumerate(self._orders) if order["do"] == "abort"]
        if aborts:
            del self._orders[: aborts[-1] + 1]
            raise _EndedError

    def _hear(self, seconds: float) -> bool:
        try:
            if not select.select([self._line], [], [], seconds)[0]:
                return False
            more = self._line.recv(1 << 16)
        except OSError as error:
            raise _GoneError from error
        if not more:
            raise _GoneError
        *lines, self._read = (self._read + more).split(b"\n")
        self._orders += map(json.loads, lines)
        return True

    def _say(self, what: dict[str, Any]) -> None:
        self._beaten = time.monotonic()
        try:
            self._line.sendall(json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise _GoneError from error


def _how(order: dict[str, Any]) -> dict[str, Any]:
    return {"staged": order["staged"], "window": order["window"]}
