"""Whether services still answer, asked again and again while something of theirs is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import grpc

from tandem import rpc
from tandem.errors import Reason, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from trainer_service.client import InferenceClient

#: A service that dies is noticed after `LOOK_S` and `ANSWER_S` at the latest, which is less than two seconds.
LOOK_S = 0.4
ANSWER_S = 1.4
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def ask(client: InferenceClient) -> Any:
    """Begin to ask a service for its version. Returns a future, which `answered` and `gone` understand."""
    return client.weights.GetWeightVersion.future(pb.GetWeightVersionRequest(), timeout=ANSWER_S)


def answered(question: Any) -> bool:
    """Whether the service has answered, with whatever."""
    return bool(question.done()) and not question.cancelled() and question.code() not in _GONE


def gone(question: Any) -> bool:
    """Whether it did not answer in time, or nobody is there."""
    return bool(question.done()) and not question.cancelled() and question.code() in _GONE


def watched(client: InferenceClient, method: Any, request: Any, timeout_s: float) -> Any:
    """A service's answer to a call, given up once the service is gone.

    Raises:
        Unavailable: UNREACHABLE, it stands still. TandemError: what it says.
    """
    gone_because: list[str] = []
    call = method.future(request, timeout=timeout_s)

    def give_up(_: InferenceClient, reason: str) -> None:
        gone_because.append(reason)
        call.cancel()

    with Pulse([client], give_up), rpc.translated():
        try:
            return call.result()
        except grpc.FutureCancelledError:
            raise Unavailable(Reason.UNREACHABLE, ", ".join(gone_because)) from None


class Pulse:
    """While it is entered, asks each of some services in turn, and calls `lost` with the one that is gone, once."""

    def __init__(
        self, clients: Iterable[InferenceClient], lost: Callable[[InferenceClient, str], None]
    ) -> None:
        self._clients = list(clients)
        self._lost = lost
        self._over = threading.Event()
        self._questions: dict[InferenceClient, Any] = {}
        self._thread = threading.Thread(target=self._run, name="tandem-pulse", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        for question in self._questions.values():
            question.cancel()

    def _run(self) -> None:
        while not self._over.is_set():
            for client in list(self._clients):
                question = self._questions.get(client)
                if question is None or answered(question):
                    self._questions[client] = ask(client)
                elif gone(question):
                    self._clients.remove(client)
                    self._lost(client, f"it does not answer: {question.code().name}")
            self._over.wait(LOOK_S / 4 if any(map(_waits, self._questions.values())) else LOOK_S)


def _waits(question: Any) -> bool:
    return not question.done()
