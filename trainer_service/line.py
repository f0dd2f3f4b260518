"""The stream in which a trainer makes its updates, one after the other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub

_WAIT_S = 0.2
_OUT_S = 0.02


class Line:
    """A call of UpdateWeights that stays open from one committed update to the next, and holds nothing in between.

    To open one takes both sides half a millisecond, for which generation may stand still. An update that ends in any
    other way ends its line.
    """

    def __init__(self, stub: WeightServiceStub, lasts_s: float) -> None:
        """Open it.

        Args:
            stub: the weight service.
            lasts_s: deadline of all updates that it carries, in seconds.
        """
        self._until = time.monotonic() + lasts_s
        # Few slots: `put` waits for the network, so that chunks don't pile up here.
        self._outbox: queue.Queue[tuple[pb.UpdateWeightsRequest, threading.Event | None] | None]
        self._outbox = queue.Queue(maxsize=4)
        self.call = stub.UpdateWeights(self._messages(), timeout=lasts_s)

    @property
    def open(self) -> bool:
        """Whether the service has not ended it, as far as is known."""
        return bool(self.call.is_active())

    def lasts(self, seconds: float) -> bool:
        """Whether it is open, and its deadline at least `seconds` from now."""
        return self.open and time.monotonic() + seconds <= self._until

    def put(self, message: pb.UpdateWeightsRequest, *, out: bool = False) -> bool:
        """Send a message, unless the service is behind for a while: False then.

        out: whether to return once it is on its way. Another thread sends it, which Python may keep waiting for
            milliseconds while this one has something to do.
        """
        sent = threading.Event() if out else None
        try:
            self._outbox.put((message, sent), timeout=_WAIT_S)
        except queue.Full:
            return False
        if sent is not None:
            sent.wait(_OUT_S)
        return True

    def put_at_once(self, message: pb.UpdateWeightsRequest) -> None:
        """Send a message if there is room for it. Waits for nothing."""
        with suppress(queue.Full):
            self._outbox.put_nowait((message, None))

    def close(self) -> None:
        """End it without a word, from any thread. Whoever waits for an answer gets an error."""
        with suppress(queue.Full):  # full and unread: the call is over, and so is its reader
            self._outbox.put_nowait(None)
        self.call.cancel()

    def _messages(self) -> Iterator[pb.UpdateWeightsRequest]:
        while (next_one := self._outbox.get()) is not None:
            message, sent = next_one
            yield message
            if sent is not None:  # gRPC asks for the next once it has sent one
                sent.set()
