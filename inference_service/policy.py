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
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import structlog

from inference_service.arenas import EngineArenas
from inference_service.engine import Engine
from inference_service.pausing import PauseMode
from inference_service.rollouts import Rollouts
from inference_service.transports import CHECKPOINT, Way
from inference_service.update import Update
from tandem.errors import Aborted, FailedPrecondition, Reason, Unavailable, invalid

log = structlog.get_logger(__name__)

FIRST_VERSION = 1
_MAX_REASON = 500
#: A trainer's numbers are less: those that follow by themselves have as many again, in 63 bits.
_NUMBERS = 2**62

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
        way: Way,
        *,
        in_flight: PauseMode = "keep",
        writer: Writer | None = None,
        new_version: int | None = None,
    ) -> Update:
        """Take the write lease for one update.

        Args:
            base_version: the committed version that the new one builds on.
            way: how its bytes come.
            new_version: its number, above the base's; base plus one if None.
            in_flight: what becomes of running rollouts when generation stops.
            writer: who writes in place, if it is another process. One that lost its lease cannot be kept from
                writing on: as long as it lives nobody else gets the lease, so that nothing is served which it
                may spoil.

        An update carries every tensor (a staged one is checked for it, an in-place one by its digest, unless
        all the trainer's parameters are the engine's memory), so that each commit heals a torn engine. An adapter's
        or a partial one does not, and is refused there.

        Raises:
            InvalidArgument: `new_version`. Aborted: LEASE_HELD; LEASE_LOST, as `Incoming.open`. FailedPrecondition:
            BASE_VERSION_MISMATCH. Unavailable: ENGINE_DEAD, and ENGINE_TORN for an update that does not heal.
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
        if way.adapter is not None:
            way.adapter.check()
        if way.partial and self._torn:
            raise self.torn_error()
        number = base_version + 1 if new_version is None else new_version
        if number <= base_version:
            raise invalid("begin.new_version", f"must be above the base version {base_version}, got {number}")
        if new_version is not None and new_version >= _NUMBERS:
            raise invalid("begin.new_version", f"must be less than {_NUMBERS}, got {new_version}")
        self.require_life()
        update = self._update = Update(self, number, way, in_flight=in_flight, writer=writer)
        try:
            await update.open()
            if way.in_place:
                await update.stop_generation()
        except BaseException:
            await self.to_its_end(update.end())  # nothing was written yet, whatever happened
            raise
        if way.in_place:
            update.start_writing()
        update.expect()  # first of all: generation may be waiting
        self.tell()
        return update

    async def restore(self) -> int:
        """Load the checkpoint that the engine started from, as a new version.

        Raises:
            FailedPrecondition: TRANSPORT_UNAVAILABLE, the weights are not where they could be written.
            What `begin` and `Update.commit` raise.
        """
        self._require_arenas()
        update = await self.begin(self.version, Way(CHECKPOINT, in_place=True))
        return await update.commit()

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

    def healed(self) -> None:
        """A whole version is there now."""
        self._torn, self._stray = "", None

    def over(self) -> None:
        """The update has ended, whichever way: the lease is free."""
        self._update = None
        self.tell()

    async def tear(self, reason: str, stray: Writer | None) -> None:
        """The weights are of no version: `reason` says why. `stray` may still be writing them."""
        self._torn = " ".join(reason.split())[:_MAX_REASON] or "an in-place update broke off"
        self._stray = stray
        if not self.engine.dead:
            try:
                await self.rollouts.fail(self.torn_error())
            except Exception:  # whatever happens to them, the lease must come back
                log.exception("rollouts could not be ended")
