"""One update of the policy: the write lease, from its begin to its one end. Knows nothing of gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from inference_service.pausing import PauseMode
from inference_service.transports import Way, incoming
from tandem.errors import FailedPrecondition, Reason, TandemError

if TYPE_CHECKING:
    from inference_service.policy import Policy, Writer
    from weight_transfer.sparse import Packed

log = structlog.get_logger(__name__)

_UPDATE = "update"  # who holds generation

T = TypeVar("T")


class Update:
    """The write lease of one update. Ends with `commit`, `abort` or `lose`, one of them, once.

    Each runs to its end even if the caller is cancelled: from there on the outcome is the service's.
    """

    def __init__(
        self, policy: Policy, number: int, way: Way, *, in_flight: PauseMode, writer: Writer | None = None
    ) -> None:
        self.in_place = way.in_place
        self.writing = False  # the engine's memory is written now, or may be
        self._policy = policy
        self._number = number
        self._in_flight = in_flight
        self._writer = writer
        self._ended = False
        self._stopped_at: float | None = None
        self._forgotten: asyncio.Future[None] | None = (
            None  # done when the engine has nothing cached any more
        )
        self._checked: asyncio.Future[None] | None = None  # from `prepare` on
        self._incoming = incoming(way, policy.arenas, policy.engine)

    async def open(self) -> None:
        """Do what takes time before bytes can come. Raises as `Incoming.open` does."""
        self._policy.engine.arriving = not self.in_place
        await self._incoming.open()

    def expect(self) -> None:
        """From now on bytes may come."""
        self._incoming.expect()

    async def stop_generation(self) -> None:
        """Have the engine idle."""
        # A torn engine was stopped when it tore. Stopping it anew, and failing to, would start it.
        engine = self._policy.engine
        if self._policy.torn:
            self._forgotten = await engine.forget()
        else:
            on_device = bool(self._policy.arenas.gpus)
            keep = self._policy.rollouts.keep_cache
            self._forgotten = await engine.halt(_UPDATE, self._in_flight, settle=on_device, keep_cache=keep)
        # Until now it went on with the step that it was in.
        self._stopped_at = time.perf_counter()

    def start_writing(self) -> None:
        """From here on a failure leaves a mix. The policy must `tell` of it."""
        self.writing = True
        self._policy.writes += self._incoming.of_policy

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        """Take a piece of a tensor.

        Raises:
            FailedPrecondition: UPDATE_ORDER, out of order, or such bytes don't come this way.
            InvalidArgument: no such tensor, or past its end.
        """
        self._still_moves()
        self._incoming.chunk(tensor, offset, data)

    def changes(self, packed: Packed) -> None:
        """Take elements of a tensor that changed. Raises as `chunk` does."""
        self._still_moves()
        self._incoming.changes(packed)

    def _still_moves(self) -> None:
        if self._checked is not None:
            raise FailedPrecondition(Reason.UPDATE_ORDER, "the update is prepared: nothing moves any more")

    @property
    def coming(self) -> bool:
        """Whether bytes are under way that come by themselves."""
        return self._incoming.coming

    async def arrived(self) -> None:
        """Wait until none are. The trainer has the lease meanwhile."""
        await self._incoming.arrived()

    async def prepare(self, digest: int | None) -> None:
        """See that all of a staged update is there and is what the trainer has, so that `commit` only installs it.

        What this raises is `commit`'s, and the update is still open then.

        Raises:
            FailedPrecondition: UPDATE_ORDER, an in-place update is not prepared, or this one was before.
        """
        self._still_moves()
        if self.in_place:
            raise FailedPrecondition(
                Reason.UPDATE_ORDER, "an in-place update cannot be prepared: its bytes are installed already"
            )
        self._checked = asyncio.ensure_future(self._incoming.check(digest))
        await asyncio.shield(self._checked)

    async def commit(self, digest: int | None = None) -> int:
        """Make what came the next version, and let generation go on. Returns the version.

        Args:
            digest: of all that the update carries, as the trainer has it. None where no byte was moved, or the update
                was prepared.

        Raises:
            DataLoss: DIGEST_MISMATCH. Staged, the old version serves on; in place, the engine is torn.
            FailedPrecondition: UPDATE_ORDER, tensors are missing from a staged update.
            Unavailable: ENGINE_DEAD.
        """
        return await self._end_by(self._commit(digest))

    async def abort(self, *, untouched: bool, reason: str) -> None:
        """Give up: the trainer writes no more. In place, only an untouched engine serves on.

        Raises:
            Unavailable: ENGINE_TORN, the engine was written to, or was torn before.
        """
        await self._end_by(self._abort(untouched, reason))

    async def lose(self, reason: str) -> None:
        """The trainer is gone, or broke the rules. It may still be writing."""
        await self._end_by(self._lose(reason))

    async def _end_by(self, way: Coroutine[Any, Any, T]) -> T:
        if self._ended:
            way.close()
            raise RuntimeError("an update ends once")
        self._ended = True
        return await self._policy.to_its_end(way)

    async def _commit(self, digest: int | None) -> int:
        policy = self._policy
        try:
            await self._bring(digest)
            policy.require_life()
            policy.rollouts.advance(self._number)
        except BaseException as error:
            known = isinstance(error, TandemError)
            log.warning("commit failed", weight_version=policy.version, exc_info=None if known else error)
            if self.writing and not self.in_place and await self._undone():
                self.writing = False
            await self._fail(
                error.message if isinstance(error, TandemError) else f"{type(error).__name__} at commit"
            )
            raise
        policy.committed += 1
        policy.healed()
        await self.end()
        return policy.version

    async def _bring(self, digest: int | None) -> None:
        """Have the new version in the engine's memory, as the trainer has it."""
        if self._checked is None:
            await self._incoming.check(digest)
        else:
            await self._checked
        if not self.in_place:
            await self.stop_generation()
            self.start_writing()
            self._policy.tell()
        await self._incoming.install()
        await self._reload()
        if self._forgotten is not None:
            await asyncio.shield(self._forgotten)

    async def _reload(self) -> None:
        if self._incoming.reloads and self._policy.arenas.reloads:
            await self._policy.engine.call_workers("tandem_reload")

    async def _undone(self) -> bool:
        """Whether the engine holds again what it held before the commit that failed."""
        try:
            # Nothing was whole before where the engine was torn.
            if self._policy.torn or not await self._incoming.undo():
                return False
            await self._reload()
        except Exception:
            log.exception("a failed commit could not be undone")
            return False
        return not self._policy.engine.dead

    async def _abort(self, untouched: bool, reason: str) -> None:
        if self._incoming.writes:  # the service knows better
            untouched = not self._incoming.touched
        self.writing = self.writing and not untouched
        await self._fail(reason or "the trainer aborted its update")
        if self._policy.torn:
            raise self._policy.torn_error()

    async def _lose(self, reason: str) -> None:
        log.warning("update lost", in_place=self.in_place, reason=reason, weight_version=self._policy.version)
        if self._incoming.writes:
            self.writing = self.writing and self._incoming.touched
        await self._fail(reason, self._writer)

    async def _fail(self, reason: str, stray: Writer | None = None) -> None:
        self._policy.failed += 1
        try:
            if self.writing:
                await self._policy.tear(reason, stray)
        finally:
            await self.end()

    async def end(self) -> None:
        """Give the lease back, and let generation go on unless the weights are torn."""
        policy = self._policy
        if self._checked is not None and not self._checked.done():
            await asyncio.wait({self._checked})  # it reads, in a thread, what is given back now
        if self._checked is not None and not self._checked.cancelled():
            self._checked.exception()  # whoever waited for it has seen it, or has left
        self._incoming.release()
        policy.engine.arriving = False
        try:
            await self._let_go_on()
            self.writing = False
            await self._incoming.give_back()
        finally:
            policy.over()

    async def _let_go_on(self) -> None:
        policy = self._policy
        try:
            # A pause that was given up holds nothing, and the lease must not wait for its turn with the engine.
            if policy.engine.held_by(_UPDATE) and not policy.torn:
                await policy.engine.release(_UPDATE)
        finally:
            if self._stopped_at is not None:
                policy.last_stopped = time.perf_counter() - self._stopped_at
