"""The policy in the engine: its weight version, and how that changes. Knows nothing of gRPC.

    COMMITTED --begin(in place)--> WRITING --commit--> COMMITTED (new version)
        |                             |----abort(untouched)--> COMMITTED
        |                             '----any other end-----> TORN --begin, commit--> COMMITTED (new version)
        '-----begin(staged)-----> STAGING --commit--> COMMITTED (new version)
                                      '----any other end-----> COMMITTED

While WRITING the engine is idle: nothing reads what is being written. While STAGING it serves the committed
version, and stops only for the moment in which the staged bytes are copied over. While TORN nothing is
served. docs/weight-plane.md has every move.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import structlog

from inference_service.arenas import EngineArenas
from inference_service.engine import Engine, PauseMode
from inference_service.rollouts import Rollouts
from inference_service.staging import Staging
from inference_service.trained import TrainedAdapter
from tandem.errors import Aborted, DataLoss, FailedPrecondition, Reason, TandemError, Unavailable, invalid

log = structlog.get_logger(__name__)

FIRST_VERSION = 1
_UPDATE = "update"  # who holds generation
_MAX_REASON = 500

T = TypeVar("T")


class WeightState(StrEnum):
    """What the engine's weights are."""

    COMMITTED = "COMMITTED"
    STAGING = "STAGING"
    WRITING = "WRITING"
    TORN = "TORN"


class Writer(Protocol):
    """Who writes in place: another process, which has the engine's memory mapped while it is alive."""

    @property
    def alive(self) -> bool: ...


class Policy:
    """Owns the weight version. One update at a time holds the write lease.

    `changed` functions are called after every change of version or state.
    """

    def __init__(self, engine: Engine, arenas: EngineArenas) -> None:
        self.engine = engine
        self.arenas = arenas
        self.manifest = arenas.manifest
        self.rollouts = Rollouts(engine, FIRST_VERSION)
        self.changed: list[Callable[[], None]] = []
        self.committed = 0
        self.failed = 0
        self.last_stopped = 0.0
        self._torn = ""
        self._stray: Writer | None = None  # lost its lease and may still be writing
        self._update: Update | None = None
        self.writes = 0  # times that writing the engine's memory began
        self._ending: set[asyncio.Task[Any]] = set()

    @property
    def version(self) -> int:
        """The committed weight version."""
        return self.rollouts.version

    @property
    def state(self) -> WeightState:
        """What the weights are."""
        if self._update is not None and self._update.writing:
            return WeightState.WRITING
        if self._torn:
            return WeightState.TORN
        staging = self._update is not None and not self._update.in_place
        return WeightState.STAGING if staging else WeightState.COMMITTED

    @property
    def torn(self) -> str:
        """Why the weights are of no version; "" if they are of one."""
        return self._torn

    async def begin(
        self,
        base_version: int,
        *,
        in_place: bool,
        in_flight: PauseMode = "keep",
        writer: Writer | None = None,
        new_version: int | None = None,
        adapter: TrainedAdapter | None = None,
    ) -> Update:
        """Take the write lease for one update.

        Args:
            base_version: the committed version that the new one builds on.
            new_version: its number, above the base's; base plus one if None.
            in_place: whether the trainer writes the engine's memory, the engine being idle until the end.
            in_flight: what becomes of running rollouts when generation stops.
            writer: who writes in place, if it is another process. One that lost its lease cannot be kept from
                writing on: as long as it lives nobody else gets the lease, so that nothing is served which it
                may spoil.
            adapter: what a staged update carries in place of the policy, if it does.

        An update carries every tensor (a staged one is checked for it, an in-place one by its digest, unless
        all the trainer's parameters are the engine's memory), so that each commit heals a torn engine. An adapter's
        does not, and is refused there.

        Raises:
            InvalidArgument: `new_version`. Aborted: LEASE_HELD. FailedPrecondition: BASE_VERSION_MISMATCH.
            Unavailable: ENGINE_DEAD, and ENGINE_TORN for an adapter.
        """
        if self._update is not None:
            raise Aborted(Reason.LEASE_HELD, "another update is under way")
        if self._stray is not None and self._stray is not writer and self._stray.alive:
            raise Aborted(
                Reason.LEASE_HELD,
                "the trainer whose update broke off still has the weights' memory: it must update or end",
            )
        if base_version != self.version:
            raise FailedPrecondition(
                Reason.BASE_VERSION_MISMATCH,
                f"the update builds on version {base_version}, but version {self.version} is committed",
                metadata={"base_version": str(base_version), "weight_version": str(self.version)},
            )
        if adapter is not None:
            adapter.check()
        number = base_version + 1 if new_version is None else new_version
        if not base_version < number < 2**63:
            raise invalid("begin.new_version", f"must be above the base version {base_version}, got {number}")
        self.require_life()
        update = self._update = Update(
            self, number, in_place=in_place, in_flight=in_flight, writer=writer, adapter=adapter
        )
        if in_place:
            try:
                await update.stop_generation()
            except BaseException:
                await self.to_its_end(update.end())  # nothing was written yet, whatever happened
                raise
            update.start_writing()
        else:
            self.tell()
        return update

    async def restore(self) -> int:
        """Load the checkpoint that the engine started from, as a new version.

        Raises:
            FailedPrecondition: TRANSPORT_UNAVAILABLE, the weights are not where they could be written.
            What `begin` and `Update.commit` raise.
        """
        self._require_arenas()
        update = await self.begin(self.version, in_place=True)
        return await update.commit(load="tandem_restore")

    def torn_error(self) -> Unavailable:
        """What a caller is told while the weights are torn."""
        return Unavailable(
            Reason.ENGINE_TORN,
            f"the weights are torn: {self._torn}; a full update or RestoreCheckpoint heals them",
            metadata={"weight_version": str(self.version)},
        )

    async def digest(self) -> int:
        """Digest of the weights of the version that is committed when this returns.

        Raises:
            Aborted: LEASE_HELD, they are being written, or were meanwhile.
            FailedPrecondition: TRANSPORT_UNAVAILABLE, they are not where they could be read.
        """
        self._require_arenas()
        if self.state is WeightState.WRITING:
            raise Aborted(Reason.LEASE_HELD, "the weights are being written")
        writes = self.writes
        found = await self.arenas.find_digest()
        if writes != self.writes:
            raise Aborted(Reason.LEASE_HELD, "the weights were written while they were read")
        return found

    def require_life(self) -> None:
        """Raise Unavailable(ENGINE_DEAD) if the engine died."""
        if self.engine.dead:
            raise Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again")

    def _require_arenas(self) -> None:
        if self.arenas.reason:
            raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, self.arenas.reason)

    def tell(self) -> None:
        """Tell everybody who wants to know that version or state changed."""
        for tell in list(self.changed):
            tell()

    async def to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`. It goes on where the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._ending.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._ending.discard)
        return await asyncio.shield(task)

    async def _tear(self, reason: str, stray: Writer | None) -> None:
        self._torn = " ".join(reason.split())[:_MAX_REASON] or "an in-place update broke off"
        self._stray = stray
        if not self.engine.dead:
            try:
                await self.rollouts.fail(self.torn_error())
            except Exception:  # whatever happens to them, the lease must come back
                log.exception("rollouts could not be ended")


class Update:
    """The write lease of one update. Ends with `commit`, `abort` or `lose`, one of them, once.

    Each runs to its end even if the caller is cancelled: from there on the outcome is the service's.
    """

    def __init__(
        self,
        policy: Policy,
        number: int,
        *,
        in_place: bool,
        in_flight: PauseMode,
        writer: Writer | None = None,
        adapter: TrainedAdapter | None = None,
    ) -> None:
        self.in_place = in_place
        self.writing = False  # the engine's memory is written now, or may be
        self._policy = policy
        self._number = number
        self._in_flight = in_flight
        self._writer = writer
        self._ended = False
        self._stopped_at: float | None = None
        self._adapter = adapter
        carried = policy.manifest if adapter is None else adapter.manifest
        self._staging = None if in_place else Staging(carried)

    async def stop_generation(self) -> None:
        """Have the engine idle."""
        self._stopped_at = time.perf_counter()
        # A torn engine was stopped when it tore. Stopping it anew, and failing to, would start it.
        if not self._policy.torn:
            await self._policy.engine.pause(_UPDATE, self._in_flight, clear_cache=True)
        await self._policy.arenas.settle()

    def start_writing(self) -> None:
        """From here on a failure leaves a mix."""
        self.writing = True
        self._policy.writes += self._adapter is None
        self._policy.tell()

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        """Stage a piece of a tensor.

        Raises:
            FailedPrecondition: UPDATE_ORDER, out of order or in an in-place update.
            InvalidArgument: no such tensor, or past its end.
        """
        if self._staging is None:
            raise FailedPrecondition(Reason.UPDATE_ORDER, "chunks belong to the stream transport")
        self._staging.add(tensor, offset, data)

    async def commit(self, digest: int | None = None, *, load: str = "") -> int:
        """Make what was written the next version, and let generation go on. Returns the version.

        Args:
            digest: of the whole policy, as the trainer has it. None where no byte was moved.
            load: a method of the workers that brings the bytes, if nobody else did.

        Raises:
            DataLoss: DIGEST_MISMATCH. Staged, the old version serves on; in place, the engine is torn.
            FailedPrecondition: UPDATE_ORDER, tensors are missing from a staged update.
            Unavailable: ENGINE_DEAD.
        """
        return await self._end_by(self._commit(digest, load))

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

    async def _commit(self, digest: int | None, load: str) -> int:
        policy = self._policy
        try:
            await self._bring(digest, load)
            policy.require_life()
            policy.rollouts.advance(self._number)
        except BaseException as error:
            known = isinstance(error, TandemError)
            log.warning("commit failed", weight_version=policy.version, exc_info=None if known else error)
            await self._fail(
                error.message if isinstance(error, TandemError) else f"{type(error).__name__} at commit"
            )
            raise
        policy.committed += 1
        policy._torn, policy._stray = "", None
        await self.end()
        return policy.version

    async def _bring(self, digest: int | None, load: str) -> None:
        """Have the new version in the engine's memory, as the trainer has it."""
        policy, arenas = self._policy, self._policy.arenas
        if self._staging is not None:
            self._staging.complete()
            found = await asyncio.to_thread(self._staging.digest)
            self._compare(digest, found)
            if self._adapter is not None:
                await self._adapter.bring(self, self._staging, found)
                return
            await self.stop_generation()
            self.start_writing()
            await arenas.write_staged(self._staging)
        elif digest is not None:
            self._compare(digest, await arenas.find_digest())
        if load or arenas.reloads:
            await policy.engine.call_workers(load or "tandem_reload")

    def _compare(self, told: int | None, found: int) -> None:
        if told is None:
            raise invalid("commit.digest", "required, since bytes moved")
        if told != found:
            raise DataLoss(
                Reason.DIGEST_MISMATCH,
                f"the trainer's weights have digest {told:016x}, those received {found:016x}",
                metadata={"trainer": f"{told:016x}", "engine": f"{found:016x}"},
            )

    async def _abort(self, untouched: bool, reason: str) -> None:
        self.writing = self.writing and not untouched
        await self._fail(reason or "the trainer aborted its update")
        if self._policy.torn:
            raise self._policy.torn_error()

    async def _lose(self, reason: str) -> None:
        log.warning("update lost", in_place=self.in_place, reason=reason, weight_version=self._policy.version)
        await self._fail(reason, self._writer)

    async def _fail(self, reason: str, stray: Writer | None = None) -> None:
        self._policy.failed += 1
        try:
            if self.writing:
                await self._policy._tear(reason, stray)
        finally:
            await self.end()

    async def end(self) -> None:
        """Give the lease back, and let generation go on unless the weights are torn."""
        policy = self._policy
        if self._staging is not None:
            self._staging.release()
            self._staging = None
        try:
            # A pause that was given up holds nothing, and the lease must not wait for its turn with the engine.
            if policy.engine.held_by(_UPDATE) and not policy.torn:
                await policy.engine.resume(_UPDATE)
        finally:
            if self._stopped_at is not None:
                policy.last_stopped = time.perf_counter() - self._stopped_at
            policy._update = None
            policy.tell()
