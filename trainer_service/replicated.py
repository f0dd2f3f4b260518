"""The policy's weights on their way to several inference services: each version is committed on all of them or on none.

Every update is staged: begin on all, one reading of the policy sent to all, prepare on all, only then commit on all.
Where one refuses, none commits, and the old version serves everywhere. One that dies is dropped, and the others go on;
when it comes back it is given everything before it is used again. docs/weight-plane.md has what each failure leaves.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tandem.errors import Aborted, FailedPrecondition, NotFound, Reason, TandemError, Unavailable, invalid
from trainer_service.adapter_session import AdapterSession
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.again import Asked, insist
from trainer_service.client import InferenceClient
from trainer_service.fleet import Fleet, over_nccl
from trainer_service.member import Member, went_away
from trainer_service.policy_tensors import policy_tensors
from trainer_service.pulse import Pulse, watched
from trainer_service.roster import Roster
from trainer_service.session import Session
from trainer_service.updates import UpdateStats, patiently
from weight_transfer.cuda import nccl
from weight_transfer.transports import (
    Handshake,
    Moved,
    Piece,
    SourceTensor,
    TransportError,
    WeightTransport,
    open_transport,
)
from weight_transfer.windows import WINDOW_BYTES

logger = logging.getLogger(__name__)

_OPEN_S = 10.0
_TRANSPORTS = ("nccl", "stream")


class ReplicatedWeights:
    """Keeps several engines' weights those of a model, as PolicyWeights does one engine's.

    Only one process of a training run has one. Nothing is ever aliased: an optimizer's steps need no lease.
    """

    aliased = False

    def __init__(
        self,
        clients: Sequence[InferenceClient],
        model: Callable[[], nn.Module],
        *,
        transport: str | Sequence[str] | None = None,
        timeout_s: float = 240.0,
        led: Callable[[list[SourceTensor]], list[SourceTensor]] = list,
        adapter: str = "",
        mode: str = "",
        sparse: bool = False,
    ) -> None:
        """Prepare; nothing is called before the first `sync`.

        Args:
            clients: one for each service; none of them has weights of another trainer.
            model: gives the policy. Asked at each update.
            transport: nccl or stream, or several of which one is: each service has the first of them that can be had.
                Both, in this order, if None.
            timeout_s: how many seconds to wait where no service answers.
            led: goes around the tensors of a policy that other ranks must read too.
            adapter: what to call the model's LoRA adapter in the engines, if it is all that they are given.
            mode: staged, as every update of several services is, or "".
            sparse: whether updates carry what changed alone, as far as the services all hold the last commit.

        Raises:
            InvalidArgument: no service, one of them twice, or a transport or mode that is another.
        """
        wanted = (transport,) if isinstance(transport, str) else transport or _TRANSPORTS
        self._transports = [name for name in wanted if name in _TRANSPORTS]
        if not self._transports:
            raise invalid(
                "transport",
                f"several replicas take their weights by NCCL or stream, not by {', '.join(wanted)}: parameters can be "
                "the memory of one engine alone",
            )
        if mode not in ("", "staged"):
            raise invalid(
                "mode", f"updates of several replicas are staged, not {mode}: else none could be given up"
            )
        self.history: deque[UpdateStats] = deque(maxlen=1000)
        self.committed = 0
        self.least = 0  # the lowest number of the next version: a resumed run goes on with its own
        self._model = model
        self._timeout_s = timeout_s
        self._led = led
        self._adapter = adapter
        self._sparse = sparse and not adapter
        self._roster = Roster(clients, self._open)
        self._names: list[str] = []  # of the engines' tensors
        self._way: WeightTransport | None = None  # what reads the policy, once for all streams
        self._fleet = Fleet()  # and for all that it reaches by NCCL
        self._cut = (0, False)  # it was made for: bytes of a chunk at most, and whether changes travel alone
        self._held = 0  # digest of the last commit
        self._asked: Asked | None = None  # a commit that was broken off
        self._turn = threading.RLock()  # one update or catching up at a time

    @property
    def weight_version(self) -> int:
        """The version that was committed last; 0 before the first."""
        return self.history[-1].weight_version if self.history else 0

    @property
    def transport(self) -> str:
        """How services that take part get the weights: nccl, stream, or nccl_stream; "" without a session."""
        sessions = [member.session for member in self._roster.members if not member.out]
        return "_".join(sorted({session.transport.name for session in sessions}))

    @property
    def bytes_moved(self) -> int:
        """Bytes that the last update moved, to each replica."""
        return self.history[-1].nbytes if self.history else 0

    @property
    def current(self) -> frozenset[InferenceClient]:
        """The services that hold the version that was committed last. May be asked from any thread."""
        return self._roster.current

    def holding(self) -> frozenset[str]:
        """Addresses of `current`."""
        return frozenset(client.address for client in self.current)

    def drop(self, client: InferenceClient, reason: str) -> None:
        """Count on a service no more, whose death somebody else noticed. From any thread."""
        self._roster.drop(client, reason)

    def sync(self) -> None:
        """Have the services hold the policy as it is now. Returns when that is committed on all that answer.

        Where none answers, waits for one to come back.

        Raises:
            Unavailable: none came back in time.
            TandemError: a service refused the update. None has committed it, and the old version serves.
        """
        deadline = time.monotonic() + self._timeout_s

        def attempt() -> None:
            with self._turn:
                self._sync(deadline)

        insist(attempt, lambda *_: None, lambda: self._asked, self._timeout_s)

    def catch_up(self) -> None:
        """Bring the current version to the services that came back, if the policy is still that version's.

        Otherwise, and where they hold a higher one, they stay out until the next `sync`. Waits for no service that does
        not answer.
        """
        with self._turn:
            self._catch_up()

    def _catch_up(self) -> None:
        roster, last = self._roster, self.weight_version
        roster.forget_the_lost()
        back = (
            [m for m in roster.members if m.holds != last and not m.resting and m.answers()] if last else []
        )
        for member in back:
            if not roster.joined(member):
                continue
            base = member.session.weight_version
            if base == last:
                self._compare(member)
            elif base < last:
                self._bring_current(member)
        roster.forget_the_lost()
        if last:
            roster.note(last)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Goes around writes to parameters, as PolicyWeights wants it. Here they need nothing."""
        yield

    def abandon(self, reason: str) -> None:
        """There is no update open between two calls."""

    def open(self) -> None:
        """Have a session with each service that answers, and with at least one. Nothing moves yet."""
        self._assemble(time.monotonic() + self._timeout_s)

    def detach(self) -> None:
        """End the sessions."""
        self._roster.close()
        self._fleet.close()
        if self._way is not None:
            self._way.close()

    def _assemble(self, deadline: float) -> list[Member]:
        return self._roster.assemble(self._timeout_s, deadline, patiently=not self.history)

    def _sync(self, deadline: float) -> None:
        started = time.perf_counter()
        members = self._assemble(deadline)
        way = self._reader(members)
        last = self.weight_version
        number = max(last + 1, self.least, *(member.session.weight_version + 1 for member in members))
        streams = [member for member in members if not over_nccl(member)]
        partial = way.partial and all(last and member.holds == last for member in streams)
        if not partial:
            way.forget()
        moved = self._commit(members, way, number, partial=partial)
        if all(member.lost for member in streams):  # it may not have read what was committed
            way.forget()
        else:
            way.mark()
        self._held = moved.digest
        self.committed += 1
        stopped = max((member.stopped for member in members if not member.lost), default=0.0)
        seconds = time.perf_counter() - started
        self.history.append(UpdateStats(number, moved.nbytes, seconds, stopped, moved.changed))
        self._roster.note(number)

    def _commit(
        self,
        members: Sequence[Member],
        way: WeightTransport,
        number: int,
        *,
        partial: bool,
        digest: int | None = None,
    ) -> Any:
        """One version on all members, or on none. Returns what moved.

        digest: that the policy must have, if it must.
        """
        try:
            with Pulse([member.client for member in members], self._roster.drop):
                self._roster.each(members, lambda member: self._begin(member, number, partial=partial))
                _require(members)
                if again := [member.client.address for member in members if member.restarted]:
                    # It is there, and would have to wait for the next version: begin anew, with all.
                    raise NotFound(Reason.SESSION_NOT_FOUND, f"{', '.join(again)} must be introduced anew.")
                moved = self._move(members, way)
                found = moved.digest
                assert found is not None  # noqa: S101  for the type checker
                if digest is not None and found != digest:
                    raise FailedPrecondition(
                        Reason.BASE_VERSION_MISMATCH, "The policy is not any more what was committed last."
                    )
                _require(members)
                self._roster.each(members, lambda member: member.prepare(found))
                _require(members)
                # From here on each commits that lives: nothing that can be foreseen stands in the way.
                self._asked = Asked(number, found)
                self._roster.each(members, Member.commit)
                _require(members)
                self._fleet.succeeded([member for member in members if not member.lost])
            self._asked = None
        except BaseException as error:
            if self._asked is not None and self._asked.number == number:
                # Whatever became of it: no other policy may have its number, and nobody what some may have.
                self.least = max(self.least, number + 1)
                for member in members:
                    member.drop(f"its commit was broken off: {error!r}")
            way.forget()
            for member in members:
                member.abort(f"not every replica could take it: {error}")
            raise
        finally:
            self._roster.forget_the_lost()
        return moved

    def _move(self, members: Sequence[Member], way: WeightTransport) -> Moved:
        """The policy to all, read once for those of each kind. Returns what moved to one, the most of them."""
        policy = self._policy(self._names)
        members[0].session.check(policy)
        here = [member for member in members if not member.lost]
        _require(here or members)
        fleet = [member for member in here if over_nccl(member)]
        moved = []
        if fleet:
            moved.append(self._fleet.move(fleet, policy))
        if len(fleet) < len(here):
            moved.append(way.move(policy, lambda piece: self._send(here, piece), digest=True))
        return max(moved, key=lambda one: one.nbytes)

    def _begin(self, member: Member, number: int, *, partial: bool) -> None:
        by_nccl = over_nccl(member)
        # Whoever was just introduced may still be making the commit in which it was lost: others need not wait for it.
        late = not member.holds and any(client is not member.client for client in self._roster.current)
        try:
            begin = functools.partial(member.begin, number, partial=partial and not by_nccl)
            begin() if late else patiently(begin)
        except TransportError as error:
            self._fleet.broke(member, error)
        except TandemError as error:
            if member.lost:  # somebody noticed it meanwhile
                return None
            if by_nccl and error.reason == Reason.LEASE_LOST:
                return self._fleet.broke(member, error)
            # A commit of ours, whose answer was lost, may have been made since it was introduced.
            overtook = error.reason == Reason.BASE_VERSION_MISMATCH and not member.holds
            busy = late and error.reason == Reason.LEASE_HELD
            if not (went_away(error) or overtook or busy):
                raise
            member.restarted = overtook or error.reason == Reason.SESSION_NOT_FOUND
            member.drop(error.message)
            if busy:
                member.rest()
        return None

    def _send(self, members: Sequence[Member], piece: Piece) -> None:
        for member in members:
            if not over_nccl(member):
                member.send(piece)
        _require(members)

    def _reader(self, members: Sequence[Member]) -> WeightTransport:
        cut = (
            min(member.session.max_chunk_bytes for member in members),
            self._sparse and all(m.session.takes_changes for m in members if not over_nccl(m)),
        )
        if self._way is None or cut != self._cut:
            if self._way is not None:
                self._way.close()
            carried = members[0].session.carried
            self._way = open_transport(Handshake("stream", carried, cut[0], partial=cut[1]))
            self._cut = cut
        return self._way

    def _compare(self, member: Member) -> None:
        """See whether it holds what was committed last."""
        try:
            if member.session.holds(self.weight_version, self._held):
                member.holds = self.weight_version
        except TandemError as error:
            if not (went_away(error) or isinstance(error, Aborted)):  # the weights are being written
                raise
            member.drop(error.message)

    def _bring_current(self, member: Member) -> None:
        session = member.session
        way = open_transport(Handshake("stream", session.carried, session.max_chunk_bytes))
        try:
            self._commit([member], way, self.weight_version, partial=False, digest=self._held)
        except TandemError as error:
            logger.info("the replica at %s stays out: %s", member.client.address, error)

    def _open(self, client: InferenceClient) -> Session:
        if self._adapter:
            how = {"name": self._adapter, "calling": functools.partial(watched, client)}
            session: Session = AdapterSession(client, self._policy, self._base, **how)  # type: ignore[arg-type]
        else:
            session = self._introduced(client)
        self._names = session.names
        return session

    def _introduced(self, client: InferenceClient) -> Session:
        by_nccl = nccl.version() and not self._fleet.fails(client)
        usable = [name for name in self._transports if name != "nccl" or by_nccl]
        *others, last = usable or self._transports
        for transport in others:
            try:
                return self._session(client, transport)
            except FailedPrecondition as error:
                if error.reason != Reason.TRANSPORT_UNAVAILABLE:
                    raise
        return self._session(client, last)

    def _session(self, client: InferenceClient, transport: str) -> Session:
        # Windows of the size of buckets: which of the services share a mirror is not known yet.
        how = {"mode": "staged", "timeout_s": _OPEN_S, "window_bytes": WINDOW_BYTES}
        calling = functools.partial(watched, client)
        return Session(client, self._policy, transport=transport, calling=calling, **how)  # type: ignore[arg-type]

    def _policy(self, wanted: Sequence[str]) -> list[SourceTensor]:
        """What updates carry."""
        if self._adapter:
            return self._led(adapter_tensors(self._model()))
        return self._led(policy_tensors(self._model(), frozenset(wanted)))

    def _base(self, wanted: Sequence[str]) -> list[SourceTensor]:
        return self._led(policy_tensors(self._model(), frozenset(wanted), merged=False))


def _require(members: Sequence[Member]) -> None:
    """Raise where none of the members takes part any more."""
    if all(member.lost for member in members):
        raise Unavailable(Reason.UNREACHABLE, f"No replica is left: {members[0].lost}")
