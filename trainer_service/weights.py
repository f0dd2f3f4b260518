"""The policy's weights on their way to the engine: the session, its updates, and what to do when one fails.

Where the parameters are the engine's memory (an aliased session), every write to them needs the lease: the
optimizer's steps take it by themselves, anything else goes inside `update()`, and what was written without it
is an error. All other sessions move everything in `sync()`.

Versions go on with the run's numbers whatever lives the engine has, and weights that a new life is given anew
keep theirs, since other ranks wait for rollouts of it.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import FailedPrecondition, Reason, TandemError
from trainer_service.adapter_session import AdapterSession
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.again import Asked, insist
from trainer_service.client import WRITABLE, InferenceClient
from trainer_service.lease import Lease
from trainer_service.listing import Listing
from trainer_service.policy_tensors import policy_tensors
from trainer_service.session import Session, first_of
from trainer_service.steps import Steps
from trainer_service.together import Together
from trainer_service.updates import (
    UpdateStats,
    at_exit,
    broken_off,
    patiently,
    retryable,
    taken,
    unleased,
)
from weight_transfer.transports import SourceTensor, TransportError

logger = logging.getLogger(__name__)


class PolicyWeights:
    """Keeps an engine's weights those of a model. Only one process of a training run has one."""

    def __init__(
        self,
        client: InferenceClient,
        model: Callable[[], nn.Module],
        *,
        transport: str | Sequence[str] | None = None,
        timeout_s: float = 240.0,
        led: Callable[[list[SourceTensor]], list[SourceTensor]] = list,
        adapter: str = "",
        mode: str = "",
        sparse: bool = False,
        together: Together | None = None,
    ) -> None:
        """Prepare; nothing is called before `open` or the first `sync`.

        Args:
            client: the service.
            model: gives the policy. Asked at each update, since trainers wrap and replace their model.
            transport: shared, nccl or stream; several, of which the first that can be had is taken; or None to let the
                service choose.
            timeout_s: how many seconds to wait for an engine that went away to come back.
            led: goes around the tensors of a policy that other ranks must read too.
            adapter: what to call the model's LoRA adapter in the engine, if it is all that the engine is given.
            mode: staged or in_place, or "" to let the service choose.
            sparse: whether updates by stream or NCCL carry what changed alone. For that the last commit is kept, in the
                engine's dtypes, where the model is.
            together: the ranks of the run, which write an engine's memory that is of several workers.
        """
        self.history: deque[UpdateStats] = deque(maxlen=1000)
        self.committed = 0  # updates, in all sessions
        self.least = 0  # the lowest number of the next one: a resumed run goes on with its own
        self._client = client
        self._model = model
        self._transports = [transport] if transport is None or isinstance(transport, str) else transport
        self._timeout_s = timeout_s
        self._led = led
        self._adapter = adapter
        self._how: dict[str, Any] = {"mode": mode, "sparse": sparse, "together": together}
        self._session: Session | None = None
        self._lease: Lease | None = None
        self._depth = 0
        self._dirty = True  # the engine may hold something else than the trainer
        self._number = 0  # of the update that began last
        self._asked: Asked | None = None
        # Number and digest of one that was, in the engine's last life: no other policy may have that number.
        self._lost: tuple[int, int] | None = None
        self._held: int | None = None  # digest of what was committed last, where it is known
        self._as_committed = False  # no lease was given since to whom might have written
        self._stood = False  # when it was last looked at
        self._spent = self._ready = 0.0
        self._listing = Listing()
        self._steps = Steps(self)
        self._finalizer: weakref.finalize[[], PolicyWeights] | None = None
        at_exit(self.abandon)

    @property
    def weight_version(self) -> int:
        """The version that the engine last committed for us; 0 before the first."""
        return self.history[-1].weight_version if self.history else 0

    @property
    def bytes_moved(self) -> int:
        """Bytes that the last update moved."""
        return self.history[-1].nbytes if self.history else 0

    @property
    def engine_id(self) -> str:
        """The life of the engine that the session is with; "" without one."""
        return self._session.engine_id if self._session else ""

    @property
    def transport(self) -> str:
        """The session's transport; "" without one."""
        return self._session.transport.name if self._session else ""

    @property
    def aliased(self) -> bool:
        """Whether parameters of the model are the engine's memory."""
        return bool(self.parameters)

    @property
    def parameters(self) -> dict[int, nn.Parameter]:
        """The parameters of the model that are the engine's memory, by `id`."""
        return self._session.transport.aliased if self._session else {}

    def open(self) -> None:
        """Open a session with the engine, if there is none. Nothing moves yet. Raises as `Session` says."""
        if self._session is not None:
            return
        self._session = patiently(self._open)
        self._dirty = True
        # Parameters must not stay engine memory once nobody is left to take the lease for them.
        self._finalizer = weakref.finalize(self, self._session.close)
        self._finalizer.atexit = False
        self._steps.watch()

    def _open(self) -> Session:
        if self._adapter:
            return AdapterSession(self._client, self._policy, self._base, name=self._adapter)
        return first_of(
            self._transports,
            lambda name: Session(self._client, self._policy, transport=name, timeout_s=30.0, **self._how),
        )

    def sync(self) -> None:
        """Have the engine hold the policy as it is now. Returns when that is committed.

        When the engine went away, waits for it to come back, and gives it everything anew.

        Raises:
            FailedPrecondition: somebody else changed the engine's weights, or parameters in the engine's memory
                were written without the lease. The engine serves nothing then until the next `sync`.
            Unavailable: the engine did not come back in time.
            TandemError: the service refused the update, and trying again would not help.
        """
        self._steps.drop_failed()
        if self._lease is not None:
            raise FailedPrecondition(Reason.UPDATE_ORDER, "sync within an update: its lease is still held")
        self._insist(self._sync)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Hold the lease while the body writes parameters in place.

        When the body raises, or an optimizer's step does in it, the engine serves nothing until the next `sync`.
        """
        self.enter()
        try:
            yield
        except BaseException as error:
            self.abandon(f"the trainer raised {type(error).__name__}")
            raise
        self._steps.drop_failed()
        self.leave()

    def abandon(self, reason: str) -> None:
        """Give up an update that is open, because the code that was writing has failed."""
        lease, self._lease, self._depth, self._dirty = self._lease, None, 0, True
        self._steps.forget()
        if lease is not None:
            lease.abort(reason, untouched=False)

    def detach(self) -> None:
        """End the session. The parameters get memory of their own, with the same values."""
        self._end_session("the trainer detached")
        self._steps.remove()

    def _end_session(self, reason: str) -> None:
        self.abandon(reason)
        if self._finalizer is not None:
            self._finalizer()
        self._session, self._finalizer, self._asked = None, None, None

    def _outlive_engine(self) -> None:
        """End the session with an engine that was started again."""
        session = self._session
        if session is not None and self._as_committed and self._held is None:
            # Commits that move no byte have no digest. The parameters are as committed, in memory that is ours too.
            policy = self._policy(session.names)
            if session.transport.settled(policy) and not session.transport.disturbed():
                self._held = session.transport.digest(policy)
        if session is not None and self._asked is not None:
            self._lost = self._with_digest(self._asked, session)
        self._end_session("the engine was restarted")

    def _with_digest(self, asked: Asked, session: Session) -> tuple[int, int]:
        """Parameters that are the engine's memory have no digest, and are as they were when it was asked for."""
        return asked.number, asked.digest or session.transport.digest(self._policy(session.names))

    def _policy(self, wanted: Sequence[str]) -> list[SourceTensor]:
        """What updates carry."""
        model = self._model()
        policy = adapter_tensors(model) if self._adapter else self._listing.policy(model, wanted)
        if self._session is not None:
            self._session.check(policy)
        return self._led(policy)

    def _stands(self, *, same_parameters: bool = False) -> bool:
        """Whether all that an update carries is known to be in memory that the transport holds, without a new list."""
        self._stood = False
        if self._session is not None and self._session.transport.stands():
            self._stood = same_parameters or self._listing.same(self._model())
        return self._stood

    def _base(self, wanted: Sequence[str]) -> list[SourceTensor]:
        return self._led(policy_tensors(self._model(), frozenset(wanted), merged=False))

    def _sync(self) -> None:
        self.open()
        session = self._session
        assert session is not None  # noqa: S101  for the type checker
        if not self._dirty and self.aliased:
            # Every step was committed as it was made. What is left to know: does that engine still live, and
            # did anything else write?
            model = self._client.wait_until_serving(self._timeout_s, accept=WRITABLE)
            if model.engine_id != session.engine_id:
                self._outlive_engine()
                return self._sync()
            if model.weight_version != session.weight_version:
                raise taken(session.weight_version, model.weight_version)
            if session.transport.disturbed():
                self._refuse(self._begin())
            if model.state != ServingState.SERVING_STATE_TORN and (
                self._stands() or session.transport.settled(self._policy(session.names))
            ):
                return None
        started = time.perf_counter()
        # What stood the last time is looked at as the service makes itself ready: that takes as long.
        ahead = not self._dirty and not self.aliased and (self._stood or self._stands())
        policy = [] if ahead else self._policy(session.names)
        lease = self._begin(stands=self._stands if ahead else None)
        if ahead and not self._stood:
            self._dirty = True  # where that ends it, the service gave up the communicator
            with lease.unwritten():
                policy = self._policy(session.names)
        self._move(lease, policy, started)
        return None

    def _begin(
        self, meanwhile: Callable[[], None] = lambda: None, stands: Callable[[], bool] | None = None
    ) -> Lease:
        session = self._session
        assert session is not None  # noqa: S101  for the type checker
        last, base = self.weight_version, session.weight_version
        number = max(last + 1, base + 1, self.least)
        if self._lost is not None:
            digest = session.transport.digest(self._policy(session.names))
            number = max(number, self._lost[0] + (self._lost[1] != digest))
        if base < last and self._held is not None:  # a new life of the engine
            policy = self._policy(session.names)
            number = last if session.transport.digest(policy) == self._held else number
        if self._dirty:
            session.transport.forget()
        started = time.perf_counter()
        try:
            lease = patiently(lambda: session.begin(number, meanwhile=meanwhile, stands=stands))
        except TransportError as error:
            raise broken_off(error) from error
        self._ready = time.perf_counter() - started
        self._number, self._asked = number, None
        return lease

    def _refuse(self, lease: Lease) -> NoReturn:
        """The engine holds weights of no version: tell it so, and the caller."""
        lease.abort("the trainer wrote without a lease", untouched=False)
        self._dirty = True
        raise unleased()

    def _move(self, lease: Lease, policy: list[SourceTensor], started: float, *, wrote: bool = False) -> None:
        session = self._session
        assert session is not None  # noqa: S101  for the type checker
        wanted = self._dirty
        self._dirty = True
        try:
            moved = session.transport.move(policy, lease.send, digest=wanted)
        except BaseException as error:
            lease.abort(str(error), untouched=not (wrote or session.transport.touched))
            # All may have been there nevertheless: then its digest tells that it was committed.
            self._asked = None if lease.promised is None else Asked(self._number, lease.promised)
            if isinstance(error, TransportError):
                raise broken_off(error) from error
            raise
        asked = time.perf_counter()
        self._asked = Asked(self._number, moved.digest)  # whatever is raised: the next `sync` finds out
        try:
            version, stopped = lease.commit(moved.digest, meanwhile=session.transport.mark)
        except BaseException:
            session.transport.leave()
            raise
        session.weight_version, self._held, self._as_committed = version, moved.digest, True
        self._dirty, self._asked, self._lost = False, None, None
        self.committed += 1
        now = time.perf_counter()
        took = {"seconds": now - started, "stopped": stopped, "ready": self._ready, "committed": now - asked}
        self.history.append(UpdateStats(version, moved.nbytes, changed=moved.changed, **took))

    def _insist(self, attempt: Callable[[], None], after: TandemError | None = None) -> None:
        insist(attempt, self._recover, lambda: self._asked, self._timeout_s, after)

    def _recover(self, error: TandemError, deadline: float) -> None:
        """Wait for an engine that can take an update. Keep the session if it is still that engine's."""
        self._dirty = True
        left = max(deadline - time.monotonic(), 0.0)
        model, session = self._client.wait_until_serving(left, accept=WRITABLE), self._session
        if (
            session is None
            or model.engine_id != session.engine_id
            or error.reason == Reason.SESSION_NOT_FOUND
        ):
            self._outlive_engine()
        elif self._asked is not None and model.weight_version == self._asked.number:
            # Perhaps our own commit, whose answer was lost. Its digest tells. Of parameters that are the engine's
            # memory it would tell nothing, but there nobody else can commit while this session lives.
            number, digest = self._with_digest(self._asked, session)
            if patiently(lambda: session.holds(number, digest)):
                session.weight_version, self._lost = number, (number, digest)
            self._asked = None

    def enter(self) -> None:
        """Take the lease, unless it is held. Each `enter` needs its `leave`."""
        self._steps.drop_failed()
        if self._depth == 0 and self.aliased:
            started = time.perf_counter()
            self._insist(self._take)
            self._spent = time.perf_counter() - started
        elif self._depth == 0:
            self._dirty = True
        self._depth += 1

    def _take(self) -> None:
        if self._session is None or self._dirty:
            self._sync()
        assert self._session is not None  # noqa: S101  for the type checker
        transport, seen = self._session.transport, []
        lease = self._begin(meanwhile=lambda: seen.append(transport.disturbed()))  # as the engine stops
        if seen[-1]:
            self._refuse(lease)
        self._lease, self._as_committed = lease, False

    def leave(self, *, same_parameters: bool = False) -> None:
        """Commit what was written since the outermost `enter`.

        same_parameters: whether the model has the parameters that it had at the last `sync`, so that they need not be
            listed anew while the engine waits. An optimizer's step replaces none.
        """
        if not self._depth:  # given up meanwhile, with all that was open
            return
        self._depth -= 1
        lease, session = self._lease, self._session
        if self._depth or lease is None or session is None:
            return
        self._lease = None
        stands = not self._dirty and self._stands(same_parameters=same_parameters)
        try:
            policy = [] if stands else self._policy(session.names)
        except BaseException as error:
            self._lease = lease
            self.abandon(str(error))
            raise
        try:
            self._move(lease, policy, time.perf_counter() - self._spent, wrote=True)
        except TandemError as error:
            if not retryable(error):
                raise
            # The parameters are whole, and the engine serves nothing: give it all of them.
            logger.warning("update lost, making up for it: %s", error)
            self._insist(self._sync, after=error)
