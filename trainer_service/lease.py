"""One update in its stream: begin, chunks, commit or abort, and heartbeats in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tandem import rpc
from tandem.errors import Aborted, DeadlineExceeded, Internal, Reason, TandemError
from tandem.weights.v1 import weights_pb2 as pb
from trainer_service.heart import HEART
from trainer_service.line import Line
from trainer_service.pulse import gone
from weight_transfer.transports import Chunk, Piece, Sum

_HEARTBEAT = pb.UpdateWeightsRequest(heartbeat=pb.Heartbeat())


class Lease:
    """The right to write the engine's weights, from Ready until `commit` or `abort`.

    A thread, one for all leases of the process, sends heartbeats meanwhile. The lease is lost when this process dies,
    when its heartbeats stop, or after `timeout_s`, whatever happens here: an update that its trainer forgot must not
    stop the engine for ever.
    """

    def __init__(
        self,
        line: Line,
        begin: pb.BeginUpdate,
        *,
        heartbeat_s: float,
        timeout_s: float,
        ready_timeout_s: float,
        answer_timeout_s: float,
        meanwhile: Callable[[Lease], None] = lambda lease: None,
        ask: Callable[[], Any] | None = None,
    ) -> None:
        """Open the update and wait until the service is ready.

        Args:
            line: to the weight service. It stays open where the update is committed.
            meanwhile: what to do while the service makes itself ready, with this lease.
            begin: the first message.
            heartbeat_s: seconds between two heartbeats.
            timeout_s: deadline of the whole update in seconds.
            ready_timeout_s: deadline of the service's first answer in seconds.
            answer_timeout_s: deadline of each later one.
            ask: begins to ask the service whether it is there, as `pulse.ask`: the update is given up where it is not.

        Raises:
            TandemError: the service refused, or did not answer in time.
        """
        self._line = line
        self._answer_timeout_s = answer_timeout_s
        self._timeout_s, self._until = timeout_s, time.monotonic() + timeout_s
        # When the answer that is waited for is overdue, and after how many seconds that is.
        self._answer_by: tuple[float, float] | None = None
        self._overdue = ""
        self._ask = ask
        self._question: Any = None
        self._ending, self._begun, self._over = threading.Lock(), False, False
        self._done: pb.UpdateWeightsResponse | None = None
        # Digest of a commit that was sent while bytes were still on their way by themselves.
        self.promised: int | None = None
        try:
            self._put(pb.UpdateWeightsRequest(begin=begin), out=True)
            HEART.add(self, heartbeat_s)
            meanwhile(self)
            self._answer("ready", ready_timeout_s)
            self._begun = True
        except BaseException:
            self._end()
            raise

    def send(self, piece: Piece) -> None:
        """Put a piece in the stream. Waits while the service is behind; raises if the update has ended.

        A `Sum` is the commit itself: the service waits for the bytes, and until they are there the update can be given
        up or lost as before.
        """
        if isinstance(piece, Sum):
            self.promised = piece.digest
            self._put(pb.UpdateWeightsRequest(commit=pb.CommitUpdate(digest=piece.digest)))
        elif isinstance(piece, Chunk):
            chunk = pb.TensorChunk(tensor=piece.tensor, offset=piece.offset, data=piece.data)
            self._put(pb.UpdateWeightsRequest(chunk=chunk))
        else:
            self._put(pb.UpdateWeightsRequest(sparse=pb.SparseChunk(**vars(piece))))

    def check(self) -> None:
        """Raise what ended the update, if the service did."""
        if not self._line.open and self._done is None:
            done = self._answer("" if self.promised is None else "committed")
            self._done = done  # it was quicker than what is looked at here

    def prepare(self, digest: int) -> None:
        """Return once all is there and has this digest, so that `commit`, which needs none then, only installs it.

        Raises:
            TandemError: it is not, and the old version serves.
        """
        try:
            self._put(pb.UpdateWeightsRequest(prepare=pb.PrepareUpdate(digest=digest)))
            self._answer("prepared")
        except BaseException:
            self._end()
            raise

    def commit(self, digest: int | None, meanwhile: Callable[[], None] = lambda: None) -> tuple[int, float]:
        """Make what was moved the new version, and do something `meanwhile`.

        Returns:
            The new version, and for how many seconds generation was stopped.

        Raises:
            TandemError: it was not committed; or, where the connection broke, that is not known.
        """
        try:
            if self.promised is None:
                self._put(pb.UpdateWeightsRequest(commit=pb.CommitUpdate(digest=digest)), out=True)
            meanwhile()
            committed = (self._done or self._answer("committed")).committed
        except BaseException:
            self._end()
            raise
        self._let_go()
        return committed.weight_version, committed.stopped.ToNanoseconds() / 1e9

    def abort(self, reason: str, *, untouched: bool) -> None:
        """Give the update up. Errors are dropped: whatever the service says, the update is over."""
        try:
            with suppress(TandemError):
                message = pb.AbortUpdate(untouched=untouched, reason=reason[:500])
                self._put(pb.UpdateWeightsRequest(abort=message))
                self._answer("aborted")
        finally:
            self._end()

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Give the update up if the body raises, which writes nothing."""
        try:
            yield
        except BaseException as error:
            self.abort(str(error), untouched=True)
            raise

    def cut(self) -> None:
        """End it without a word, from any thread: the service is gone. Whoever waits here gets an error."""
        self._end()

    def _put(self, message: pb.UpdateWeightsRequest, *, out: bool = False) -> None:
        while not self._line.put(message, out=out):
            self.check()

    def _answer(self, step: str, timeout_s: float | None = None) -> pb.UpdateWeightsResponse:
        timeout_s = self._answer_timeout_s if timeout_s is None else timeout_s
        self._answer_by = time.monotonic() + timeout_s, timeout_s
        try:
            with rpc.translated():
                response: pb.UpdateWeightsResponse = next(self._line.call)
        except StopIteration:
            if not self._begun:
                self._line.stale = True
                message = "The service ended the stream before the update began."
                raise Aborted(Reason.LEASE_LOST, message) from None
            raise Internal(Reason.BUG, "The service ended the update without an answer.") from None
        except TandemError as error:
            if self._overdue:
                raise DeadlineExceeded(Reason.DEADLINE, self._overdue) from error
            raise
        finally:
            self._answer_by = None
        if response.WhichOneof("step") != step:
            raise Internal(Reason.BUG, f"The service answered {response.WhichOneof('step')}, not {step}.")
        return response

    def beat(self) -> None:
        """Say that this process lives, and give up what is overdue. Waits for nothing."""
        with self._ending:
            if self._over:  # its line may be the next update's by now
                return
            now = time.monotonic()
            if (answer := self._answer_by) is not None and now > answer[0]:
                self._overdue = f"The service did not answer the update within {answer[1]:g} s."
            elif now > self._until:
                self._overdue = f"The update took more than {self._timeout_s:g} s."
            if self._overdue:
                self._line.close()
        self._line.put_at_once(_HEARTBEAT)  # full of chunks: they are signs of life as well
        if self._ask is not None and (self._question is None or self._question.done()):
            with suppress(ValueError):  # of a channel that was closed; this is everybody's thread
                self._question = self._ask()
                self._question.add_done_callback(self._heard)

    def _heard(self, question: Any) -> None:
        """What was asked has an answer, or none in time."""
        with self._ending:
            if gone(question) and not self._over:
                self._overdue = "The service stands still, or cannot be reached."
                self._line.close()

    def _end(self) -> None:
        self._let_go()
        self._line.close()

    def _let_go(self) -> None:
        with self._ending:
            self._over = True
        HEART.remove(self)
        if (question := self._question) is not None:
            question.cancel()
