"""Trainers' sessions: the handshake that checks a trainer's tensors and picks the transport, and who gets the arenas'
descriptors. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import structlog

from inference_service.arenas import EngineArenas, Handle, HostArenas
from inference_service.descriptor_socket import DescriptorSocket, departure
from inference_service.device_arenas import DeviceArenas
from inference_service.modes import Modes
from inference_service.session import Session
from inference_service.staging import MappedStaging
from inference_service.trained import TrainedAdapter
from inference_service.transports import NCCL, SHARED, STREAM, Way
from inference_service.transports.nccl import Invitation
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason, Violation, invalid
from weight_transfer import descriptors
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import TensorSpec, mismatches
from weight_transfer.placement import Placement, packed
from weight_transfer.tiles import tilings
from weight_transfer.windows import MIRROR_BYTES, WINDOW_BYTES, windows

log = structlog.get_logger(__name__)

ATTACH_SECONDS = 4.0  # less than trainers wait for a session that another may have left behind
# A trainer reads and checks every block before it comes: those of thousands of experts on many GPUs take seconds.
_ATTACH_SECONDS_PER_BLOCK = 1e-4
MAX_STREAM_SESSIONS = 64


class Sessions:
    """Opens sessions and passes descriptors. `start` before, `stop` after.

    Only processes of this user, and of `uids`, get descriptors. A trainer of another user takes them from a
    service that runs as root only.
    """

    def __init__(self, arenas: EngineArenas, uids: Sequence[int] = (), modes: Modes | None = None) -> None:
        self._arenas = arenas
        self._modes = modes or Modes(arenas)
        self._identity = ProcessIdentity.current(arenas.gpus)
        self._socket = DescriptorSocket(uids, self._attend)
        self._streams: OrderedDict[str, Session] = OrderedDict()
        self._shared: Session | None = None

    @property
    def path(self) -> str:
        """The descriptor socket."""
        return self._socket.path

    async def start(self) -> None:
        """Listen on the descriptor socket."""
        self._socket.start()

    async def stop(self) -> None:
        """End every session and remove the socket."""
        await self._socket.stop()

    def check(self, tensors: Sequence[TensorSpec]) -> None:
        """Compare a trainer's tensors with the engine's.

        Raises:
            InvalidArgument: MANIFEST_MISMATCH, naming every tensor that is not the engine's.
            FailedPrecondition: TRANSPORT_UNAVAILABLE, the engine has none to compare with, and why.
        """
        if self._arenas.reason:
            raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, self._arenas.reason)
        if found := mismatches(self._arenas.manifest, tensors):
            log.warning("manifest refused", mismatches=[f"{m.name}: {m.problem}" for m in found])
            raise InvalidArgument(
                Reason.MANIFEST_MISMATCH,
                f"{len({m.name for m in found})} tensors are not the engine's, "
                f"first {found[0].name}: {found[0].problem}",
                violations=[Violation(f"tensors[{m.name}]", m.problem) for m in found],
            )

    def open(
        self,
        tensors: Sequence[TensorSpec],
        identity: ProcessIdentity,
        transport: str = "",
        adapter: TrainedAdapter | None = None,
        mode: str = "",
        nccl: int = 0,
        window: int = 0,
        members: Sequence[ProcessIdentity] = (),
    ) -> Session:
        """Introduce a trainer that has `tensors`.

        Args:
            tensors: of the trainer's policy.
            identity: where the trainer lives.
            transport: the one to use, or "" to have the fastest possible one chosen.
            adapter: what its updates shall carry in place of the policy, by stream alone.
            mode: staged or in_place, or "" to have the service choose.
            nccl: the version of the trainer's NCCL, 0 if it has none.
            window: bytes of a window as the trainer wants it, 0 if it has no wish.
            members: where its further ranks live, if they can write together with it.

        Raises:
            FailedPrecondition: TRANSPORT_UNAVAILABLE, saying why, and which field is at fault. And what `check` raises.
            Aborted: LEASE_HELD, another trainer shares the engine's memory.
        """
        self.check(tensors)
        why_not = "" if adapter is None else "an adapter is no memory of the engine's"
        no_nccl = why_not or self._why_not_nccl(identity, nccl)
        if len({handle.rank for handle in self._arenas.handles}) == 1:
            members = ()
        field, why_apart = self._identity.why_not_shared(identity, members)
        why_not = why_not or (f"{field}: {why_apart}" if field.startswith("members[") else why_apart)
        if reason := {SHARED: why_not, NCCL: no_nccl}.get(transport):
            raise FailedPrecondition(
                Reason.TRANSPORT_UNAVAILABLE,
                f"{transport}: {reason}",
                violations=[Violation(field, why_apart)] if transport == SHARED and why_apart else [],
            )
        if self._shared is not None:
            raise Aborted(Reason.LEASE_HELD, "another trainer shares the engine's memory")
        chosen = transport or (SHARED if not why_not else STREAM if no_nccl else NCCL)
        if chosen == STREAM and self._arenas.gpus and no_nccl != why_not:
            why_not = f"{why_not}; nccl: {no_nccl}"
        mode = self._modes.for_session(chosen, mode, adapter=adapter is not None)
        where = {p.spec.name: p for p in self._arenas.placements}
        shares = chosen == SHARED and mode == "in_place"
        session = Session(
            id=uuid.uuid4().hex,
            transport=chosen,
            reason=why_not if chosen != SHARED and not transport else "",
            tensors=tuple(tensors),
            mode=mode,
            stage=MappedStaging(self._arenas.manifest) if chosen == SHARED and not shares else None,
            adapter=adapter,
            window_bytes=min(window or WINDOW_BYTES, MIRROR_BYTES if self.ranks == 2 else WINDOW_BYTES),
            ranks=1 + len(members) if shares else 1,
            aliased=shares and not members and not any(where[t.name].alias_reason(t.dtype) for t in tensors),
        )
        if chosen == SHARED:
            session.token = secrets.token_bytes(descriptors.TOKEN_BYTES)
            self._shared = session
            self._socket.spawn(self._expire(session))
        else:
            self._streams[session.id] = session
            while len(self._streams) > MAX_STREAM_SESSIONS:
                self._streams.popitem(last=False)
        log.info("session opened", session=session.id, transport=chosen, why=session.reason, pid=identity.pid)
        return session

    def get(self, session_id: str) -> Session:
        """A session that lives.

        Raises:
            NotFound: SESSION_NOT_FOUND, it has ended, or the service was restarted since.
        """
        if self._shared is not None and self._shared.id == session_id and self._shared.attached:
            return self._shared
        if session_id in self._streams:
            self._streams.move_to_end(session_id)
            return self._streams[session_id]
        raise NotFound(
            Reason.SESSION_NOT_FOUND, "no such session; open one anew", metadata={"session_id": session_id}
        )

    def _why_not_nccl(self, identity: ProcessIdentity, version: int) -> str:
        if not self._arenas.gpus:
            return "the engine's weights are in host memory"
        if not self._arenas.nccl:
            return "the engine's worker has no NCCL of version 2.18 or later"
        if not version:
            return "the trainer has no NCCL of version 2.18 or later, or not its whole policy on one GPU"
        if version != self._arenas.nccl:  # it joins with no other
            return (
                f"the trainer's NCCL is {_release(version)}, and the engine's {_release(self._arenas.nccl)}"
            )
        if set(identity.gpu_uuids) & set(self._arenas.gpus):
            return "the trainer is on the engine's GPU, which NCCL takes once"
        return ""

    @property
    def ranks(self) -> int:
        """Of a trainer's communicator: its own, and the engine's workers'."""
        return 1 + self._arenas.workers

    def handles(self, session: Session) -> list[Handle]:
        """The memory that a session's trainer maps, or lays out its tensors for."""
        if session.transport == NCCL and self._arenas.workers > 1:
            return [Handle(-1, max(self._arenas.manifest.offsets[-1], 1))]
        if session.stage is None:
            return self._arenas.handles
        return [Handle(session.stage.arena.fd, session.stage.arena.size)]

    def placements(self, session: Session) -> dict[str, Placement]:
        """Where in that memory it writes each tensor, by name."""
        found = self._arenas.placements if session.stage is None else session.stage.placements
        if session.transport == NCCL and self._arenas.workers > 1:
            found = packed(self._arenas.manifest)
        return {placement.spec.name: placement for placement in found}

    def takes_changes(self, session: Session) -> bool:
        """Whether a session's updates may be partial."""
        if session.transport == NCCL:
            return self._tiled
        return (
            session.transport == STREAM and session.adapter is None and isinstance(self._arenas, HostArenas)
        )

    @cached_property
    def _tiled(self) -> bool:
        """Whether changes can be told of the engine's memory: it is of one worker, and tensors lie in ranges."""
        try:
            tilings(windows(self._arenas.placements), self._arenas.placements)
        except ValueError as error:
            log.info("updates by NCCL stay whole", reason=str(error))
            return False
        return self._arenas.workers == 1

    def way(self, session: Session, *, partial: bool = False, nccl_id: bytes = b"") -> Way:
        """How the bytes of a session's update come that begins now.

        Raises:
            InvalidArgument: `begin.partial`, this session's updates are whole; `begin.nccl_id`.
        """
        invitation = None
        if session.transport == NCCL and isinstance(self._arenas, DeviceArenas):
            invitation = Invitation(
                self._arenas.link, session.id, nccl_id, session.window_bytes, session.broke_off
            )
        elif nccl_id:
            raise invalid("begin.nccl_id", f"the session goes by {session.transport}")
        if partial and not self.takes_changes(session):
            raise invalid("begin.partial", f"the session's updates are whole: it goes by {session.transport}")
        return Way(
            session.transport,
            in_place=self._modes.in_place(session.mode),
            partial=partial,
            adapter=session.adapter,
            stage=session.stage,
            invitation=invitation,
        )

    async def _attend(self, connection: socket.socket, pid: int, uid: int, token: bytes) -> None:
        session = self._shared
        fits = session is not None and hmac.compare_digest(token, session.token)
        if session is None or session.attached or not fits:
            known = self._socket.knows(uid)
            log.warning("descriptors refused", pid=pid, uid=uid, known_user=known, token_fits=fits)
            with contextlib.suppress(OSError):
                descriptors.refuse(connection)
            return
        session.joined += 1
        session.here += 1
        reason = "the service stopped"
        try:
            with contextlib.suppress(OSError):
                descriptors.send(connection, [handle.fd for handle in self.handles(session)])
                await departure(connection, pid)
            reason = f"the trainer (process {pid}) closed its session or died"
        finally:
            session.here -= 1
            self._end(session, reason)

    def _attach_seconds(self) -> float:
        blocks = sum(len(placement.blocks) for placement in self._arenas.placements)
        return ATTACH_SECONDS + _ATTACH_SECONDS_PER_BLOCK * blocks

    async def _expire(self, session: Session) -> None:
        await asyncio.sleep(self._attach_seconds())
        if not session.attached:
            who = f"{session.ranks - session.joined} of the trainer's {session.ranks} ranks"
            self._end(
                session, f"{'the trainer' if session.ranks == 1 else who} never fetched the descriptors"
            )

    def _end(self, session: Session, reason: str) -> None:
        if session.over:  # the first of its ranks to go ended it
            return
        if self._shared is session:
            self._shared = None
        log.info("session ended", session=session.id, reason=reason)
        session.end(reason)


def _release(version: int) -> str:
    """NCCL's version as people write it, from what ncclGetVersion tells: 22809 is 2.28.9."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
