"""The stream in which a trainer makes its updates, one after the other."""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub

_WAIT_S = 0.2
_OUT_S = 0.02
_SLOTS = 4

#: Messages, each with what is set once it is on its way; None is the end.
_Outbox: TypeAlias = "queue.SimpleQueue[tuple[pb.UpdateWeightsRequest, threading.Event | None] | None]"


class Line:
    """A call of UpdateWeights that stays open from one committed update to the next, and holds nothing in between.

    To open one takes both sides half a millisecond, for which generation may stand still. An update that ends in any
    other way ends its line, and so does whoever forgets it. It is this process's alone, and not that of one that is
    forked from it.
    """

    def __init__(self, stub: WeightServiceStub, lasts_s: float) -> None:
        """Open it.

        Args:
            stub: the weight service.
            lasts_s: deadline of all updates that it carries, in seconds.
        """
        #: The service had ended it, in order, before an update began in it: nothing has happened.
        self.stale = False
        self._until = time.monotonic() + lasts_s
        self._pid = os.getpid()
        self._outbox: _Outbox = queue.SimpleQueue()  # which may be put into anywhere, in a finalizer as well
        # Few slots: `put` waits for the network, so that chunks don't pile up here.
        self._slots = threading.BoundedSemaphore(_SLOTS)
        self.call: Any = stub.UpdateWeights(_messages(self._outbox, self._slots), timeout=lasts_s)
        # Or the thread that reads would wait for what comes next.
        self.call.add_callback(functools.partial(self._outbox.put, None))
        self._end = weakref.finalize(self, _end, self.call, self._outbox, self._pid)
        self._end.atexit = False

    @property
    def open(self) -> bool:
        """Whether the service has not ended it, as far as is known."""
        return self._pid == os.getpid() and bool(self.call.is_active())

    def lasts(self, seconds: float) -> bool:
        """Whether it is open, and its deadline at least `seconds` from now."""
        return self.open and time.monotonic() + seconds <= self._until

    def put(self, message: pb.UpdateWeightsRequest, *, out: bool = False) -> bool:
        """Send a message, unless the service is behind for a while: False then.

        out: whether to return once it is on its way. Another thread sends it, which Python may keep waiting for
            milliseconds while this one has something to do.
        """
        if not self._slots.acquire(timeout=_WAIT_S):
            return False
        sent = threading.Event() if out else None
        self._outbox.put((message, sent))
        if sent is not None:
            sent.wait(_OUT_S)
        return True

    def put_at_once(self, message: pb.UpdateWeightsRequest) -> None:
        """Send a message if there is room for it. Waits for nothing."""
        if self._slots.acquire(blocking=False):
            self._outbox.put((message, None))

    def close(self) -> None:
        """End it without a word, from any thread. Whoever waits for an answer gets an error."""
        self._end()


# Neither may hold the line: gRPC's thread, which reads the messages, would keep it for ever.
def _messages(outbox: _Outbox, slots: threading.BoundedSemaphore) -> Iterator[pb.UpdateWeightsRequest]:
    while (next_one := outbox.get()) is not None:
        slots.release()
        message, sent = next_one
        yield message
        if sent is not None:  # gRPC asks for the next once it has sent one
            sent.set()


def _end(call: Any, outbox: _Outbox, pid: int) -> None:
    if pid == os.getpid():
        outbox.put(None)
        call.cancel()
