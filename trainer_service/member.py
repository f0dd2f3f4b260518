"""One of several inference services that take the same weights: its session, its lease, and whether it takes part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from tandem.errors import DeadlineExceeded, Reason, TandemError, Unavailable
from trainer_service.client import InferenceClient, is_gone
from trainer_service.lease import Lease
from trainer_service.pulse import ANSWER_S, answered, ask, gone
from trainer_service.session import Session
from weight_transfer.transports import Piece

logger = logging.getLogger(__name__)

_LOOK_S = 0.01
_READY_S = 10.0
_REST_S = 1.0


class Member:
    """Is out from the moment when its service fails in any way, until it holds what the others hold."""

    def __init__(self, client: InferenceClient, opened: Callable[[InferenceClient], Session]) -> None:
        """Prepare; nothing is called yet.

        Args:
            client: of the service.
            opened: opens a session with it.
        """
        self.client = client
        self.holds = 0  # the version that we brought it last and that it is known to have; 0 if none
        self.lost = ""  # why it takes no part in the update that is open
        self.restarted = False  # it was lost because it did not know its session, or had another version
        self.stopped = 0.0  # seconds for which its generation stood still
        self._opened = opened
        self._session: Session | None = None
        self._lease: Lease | None = None
        self._question: Any = None
        self._rested = 0.0  # when

    @property
    def session(self) -> Session:
        """Its session, after `join`."""
        if self._session is None:
            raise AssertionError("a session was asked for before it was opened")
        return self._session

    @property
    def out(self) -> bool:
        """Whether it must be joined before it takes part."""
        return self._session is None

    def rest(self) -> None:
        """Its service still has our last lease: leave it alone for a while, or it makes every update whole."""
        self._rested = time.monotonic() + _REST_S

    @property
    def resting(self) -> bool:
        """Whether it need not be asked yet."""
        return time.monotonic() < self._rested

    def ask(self) -> None:
        """Ask whether it is there, unless that was asked and it may still answer."""
        if self._question is None or gone(self._question):
            self._question = ask(self.client)

    def answers(self, wait_s: float = 0.0) -> bool:
        """Whether it has answered since it was asked, within `wait_s` from now at the latest."""
        self.ask()
        end = time.monotonic() + wait_s
        while not self._question.done():
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_S)
        found, self._question = answered(self._question), None
        return found

    def join(self) -> None:
        """Introduce the policy anew: the service may have another life, and other weights. Raises as Session does."""
        self.close()  # first: it is out if this fails
        self._session, self.lost, self.restarted = self._opened(self.client), "", False

    def begin(self, number: int, *, partial: bool) -> None:
        """Take its lease. Raises as `Session.begin` does."""

        def begun(lease: Lease) -> None:
            self._lease = lease
            if self.lost:  # meanwhile
                lease.cut()

        try:
            # By NCCL memory is had first; if it dies, the lease is cut.
            patience = _READY_S if self.session.transport.name == "nccl" else ANSWER_S
            self.session.begin(number, partial=partial, ready_timeout_s=patience, begun=begun, watched=True)
        except BaseException:
            self._lease = None
            raise

    def check(self) -> None:
        """Raise once it takes no part in the update any more."""
        if self._lease is None:
            raise Unavailable(Reason.UNREACHABLE, self.lost or "its update has ended")
        self._lease.check()

    def send(self, piece: Piece) -> None:
        """Send it a piece, unless it is lost."""
        self._lively(lambda lease: lease.send(piece))

    def prepare(self, digest: int) -> None:
        """Have it check what it got, unless it is lost. Raises as `Lease.prepare` does where it refuses."""
        self._lively(lambda lease: lease.prepare(digest))

    def commit(self) -> None:
        """Have it install what it prepared, unless it is lost. Whatever fails makes it lost."""

        def install(lease: Lease) -> None:
            try:
                version, self.stopped = lease.commit(None, meanwhile=self.session.transport.mark)
            except TandemError as error:  # what it holds now is not known
                self.drop(error.message)
            else:
                self.session.weight_version = self.holds = version

        self._lively(install)

    def abort(self, reason: str) -> None:
        """Give its update up, if one is open: what was staged is dropped."""
        lease, self._lease = self._lease, None
        if lease is not None and not self.lost:
            lease.abort(reason, untouched=True)
        if self._session is not None:
            self._session.transport.forget()

    def drop(self, reason: str) -> None:
        """It takes part no more: whoever waits for it is told so. From any thread."""
        if not self.lost:
            self.lost = reason
            logger.warning("the replica at %s is dropped: %s", self.client.address, reason)
            if (lease := self._lease) is not None:
                lease.cut()

    def leave(self) -> None:
        """Where it was dropped, have it joined before it takes part again."""
        lease, self._lease = self._lease, None
        if self.lost:
            if lease is not None:  # its heart must not go on beating
                lease.cut()
            self.close()

    def close(self) -> None:
        """End its session."""
        session, self._session, self.holds = self._session, None, 0
        if session is not None:
            session.close()

    def _lively(self, call: Callable[[Lease], None]) -> None:
        """Call, unless it is lost. That it went away meanwhile is no error here."""
        lease = self._lease
        if self.lost or lease is None:
            return
        try:
            call(lease)
        except TandemError as error:
            if not self.lost and not went_away(error):
                raise
            self.drop(error.message)


def went_away(error: TandemError) -> bool:
    """Whether an error says that a service is not there, and not that it refuses."""
    return is_gone(error) or isinstance(error, DeadlineExceeded | Unavailable)
