"""The policy in the engine: its weight version, and how that changes. Knows nothing of gRPC.

    COMMITTED --begin(in place)--> WRITING --commit--> COMMITTED (version + 1)
        |                             |----abort(untouched)--> COMMITTED
        |                             '----any other end-----> TORN --begin, commit--> COMMITTED (version + 1)
        '-----begin(staged)-----> STAGING --commit--> COMMITTED (version + 1)
                                      '----any other end-----> COMMITTED

While WRITING the engine is idle: nothing reads what is being written. While STAGING it serves the committed version, and
stops only for the moment in which the staged bytes are copied over. While TORN nothing is served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import structlog

from inference_service.arenas import EngineArenas
from inference_service.engine import Engine, PauseMode
from inference_service.rollouts import Rollouts
from inference_service.staging import Staging
from tandem.errors import Aborted, DataLoss, FailedPrecondition, Reason, Unavailable, invalid

log = structlog.get_logger(__name__)

FIRST_VERSION = 1
_UPDATE = "update"  # who holds generation


class WeightState(StrEnum):
    """What the engine's weights are."""

    COMMITTED = "COMMITTED"
    STAGING = "STAGING"
    WRITING = "WRITING"
    TORN = "TORN"


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
        self._update: Update | None = None

    @property
    def version(self) -> int:
        """The committed weight version."""
        return self.rollouts.version

    @property
    def state(self) -> WeightState:
        """What the weights are."""
        if self._update is not None and self._update.in_place:
            return WeightState.WRITING
        if self._torn:
            return WeightState.TORN
        return WeightState.STAGING if self._update is not None else WeightState.COMMITTED

    @property
    def torn(self) -> str:
        """Why the weights are of no version; "" if they are of one."""
        return self._torn

    async def begin(self, base_version: int, *, in_place: bool, in_flight: PauseMode = "keep") -> Update:
        """Take the write lease for one update.

        Args:
            base_version: the committed version that the new one builds on.
            in_place: whether the trainer writes the engine's memory; the engine is idle from now until the end.
            in_flight: what becomes of running rollouts when generation stops.

        An update carries every tensor (a staged one is checked for it, an in-place one by its digest, unless all the
        trainer's parameters are the engine's memory), so that each commit heals a torn engine.

        Raises:
            Aborted: LEASE_HELD. FailedPrecondition: BASE_VERSION_MISMATCH. Unavailable: ENGINE_DEAD.
        """
        if self._update is not None:
            raise Aborted(Reason.LEASE_HELD, "another update is under way")
        if base_version != self.version:
            raise FailedPrecondition(
                Reason.BASE_VERSION_MISMATCH,
                f"the update builds on version {base_version}, but version {self.version} is committed",
                metadata={"base_version": str(base_version), "weight_version": str(self.version)},
            )
        update = self._update = Update(self, in_place=in_place, in_flight=in_flight)
        try:
            if in_place:
                await update.stop_generation()
        except BaseException:
            # Nothing was written yet, whatever happened.
            await asyncio.shield(update.end())
            raise
        self._tell()
        return update

    async def restore(self) -> int:
        """Load the checkpoint that the engine started from, as a new version."""
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
        """Digest of the weights. Only while nobody writes them in place."""
        if self.state is WeightState.WRITING:
            raise Aborted(Reason.LEASE_HELD, "the weights are being written")
        return await asyncio.to_thread(self.arenas.digest)

    def _tell(self) -> None:
        for tell in self.changed:
            tell()


class Update:
    """The write lease of one update. Ends with `commit`, `abort` or `lose`, each of which may be called once."""

    def __init__(self, policy: Policy, *, in_place: bool, in_flight: PauseMode) -> None:
        self._policy = policy
        self.in_place = in_place
        self._in_flight = in_flight
        self._stopped_at: float | None = None
        self._staging = None if in_place else Staging(policy.manifest)

    async def stop_generation(self) -> None:
        """Have the engine idle."""
        self._stopped_at = time.perf_counter()
        await self._policy.engine.pause(_UPDATE, self._in_flight, clear_cache=True)

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

        Runs to its end even if the caller is cancelled: from here on the outcome is the service's.

        Raises:
            DataLoss: DIGEST_MISMATCH. Staged, the old version serves on; in place, the engine is torn.
            FailedPrecondition: UPDATE_ORDER, tensors are missing from a staged update.
        """
        return await asyncio.shield(asyncio.ensure_future(self._commit(digest, load)))

    async def abort(self, *, untouched: bool, reason: str) -> None:
        """Give up. In place, only an untouched engine serves on.

        Raises:
            Unavailable: ENGINE_TORN, the engine was written to.
        """
        if self.in_place and not untouched:
            await self.lose(reason or "the trainer aborted its update")
            raise self._policy.torn_error()
        self._policy.failed += 1
        await self.end()

    async def lose(self, reason: str) -> None:
        """The trainer is gone."""
        log.warning("update lost", in_place=self.in_place, reason=reason, weight_version=self._policy.version)
        self._policy.failed += 1
        if self.in_place:
            await self._tear(reason)
        await self.end()

    async def _commit(self, digest: int | None, load: str) -> int:
        policy, arenas = self._policy, self._policy.arenas
        try:
            if self._staging is not None:
                tensors = self._staging.complete()
                await self._compare(digest, await asyncio.to_thread(self._staging.digest))
                await self.stop_generation()
                self.in_place = True  # from here on a failure leaves a mix
                await asyncio.to_thread(arenas.write, tensors)
            elif digest is not None:
                await self._compare(digest, await asyncio.to_thread(arenas.digest))
            if load or arenas.reloads:
                await policy.engine.call_workers(load or "tandem_reload")
        except BaseException as error:
            policy.failed += 1
            if self.in_place:
                await self._tear(str(error))
            await self.end()
            raise
        policy.rollouts.advance(policy.version + 1)
        policy.committed += 1
        policy._torn = ""
        await self.end()
        return policy.version

    async def _compare(self, told: int | None, found: int) -> None:
        if told is None:
            raise invalid("commit.digest", "required, since bytes moved")
        if told != found:
            raise DataLoss(
                Reason.DIGEST_MISMATCH,
                f"the trainer's weights have digest {told:016x}, those received {found:016x}",
                metadata={"trainer": f"{told:016x}", "engine": f"{found:016x}"},
            )

    async def _tear(self, reason: str) -> None:
        self._policy._torn = reason
        if not self._policy.engine.dead:
            await self._policy.rollouts.fail(self._policy.torn_error())

    async def end(self) -> None:
        """Give the lease back, and let generation go on unless the weights are torn."""
        policy = self._policy
        self._staging = None
        try:
            if self._stopped_at is not None and not policy._torn:
                await policy.engine.resume(_UPDATE)
        finally:
            if self._stopped_at is not None:
                policy.last_stopped = time.perf_counter() - self._stopped_at
            policy._update = None
            policy._tell()
