"""Trainers' sessions: the handshake that checks a trainer's tensors and picks the transport, and the socket that passes
the arenas' descriptors. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import shutil
import socket
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from inference_service.arenas import EngineArenas
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason, Violation
from weight_transfer import descriptors
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import TensorSpec, mismatches

log = structlog.get_logger(__name__)

SHARED, STREAM = "shared", "stream"
TRANSPORTS = (SHARED, STREAM)  # the fastest first
ATTACH_SECONDS = 10.0
MAX_STREAM_SESSIONS = 64


@dataclass
class Session:
    """One trainer's. A shared one lives as long as its connection to the descriptor socket."""

    id: str
    transport: str
    reason: str  # why not a faster transport
    tensors: tuple[TensorSpec, ...]
    token: bytes = b""
    aliased: bool = False  # every parameter of the trainer may be the engine's memory
    committed: bool = False  # it has committed an update: what can be aliased is
    connection: socket.socket | None = None
    ended: list[Callable[[str], None]] = field(default_factory=list)


class Sessions:
    """Opens sessions and passes descriptors. `start` before, `stop` after."""

    def __init__(self, arenas: EngineArenas, gpu_uuids: tuple[str, ...], uids: Sequence[int] = ()) -> None:
        self._arenas = arenas
        self._identity = ProcessIdentity.current(gpu_uuids)
        self._uids = {os.geteuid(), *uids}
        self._streams: OrderedDict[str, Session] = OrderedDict()
        self._shared: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._folder = ""
        self._listener: socket.socket | None = None

    @property
    def path(self) -> str:
        """The descriptor socket."""
        return os.path.join(self._folder, "descriptors.sock")

    @property
    def arena_sizes(self) -> list[int]:
        """Bytes of each arena, in the order of their descriptors."""
        return [arena.size for arena in self._arenas.arenas]

    async def start(self) -> None:
        """Listen on the descriptor socket, in a folder that only this user can enter."""
        self._folder = tempfile.mkdtemp(prefix="tandem-")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._spawn(self._accept(self._listener))

    async def stop(self) -> None:
        """End every session and remove the socket."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, tensors: Sequence[TensorSpec], identity: ProcessIdentity, transport: str = "") -> Session:
        """Introduce a trainer that has `tensors`.

        Args:
            transport: the one to use, or "" to have the fastest possible one chosen.

        Raises:
            InvalidArgument: MANIFEST_MISMATCH, naming every tensor that is not the engine's.
            FailedPrecondition: TRANSPORT_UNAVAILABLE, saying why.
            Aborted: LEASE_HELD, another trainer shares the engine's memory.
        """
        if self._arenas.reason:
            raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, self._arenas.reason)
        if found := mismatches(self._arenas.manifest, tensors):
            raise InvalidArgument(
                Reason.MANIFEST_MISMATCH,
                f"{len(found)} tensors are not the engine's, first {found[0].name}: {found[0].problem}",
                violations=[Violation(f"tensors[{m.name}]", m.problem) for m in found],
            )
        why_not = self._identity.why_not_shared(identity)
        if transport == SHARED and why_not:
            raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, f"shared: {why_not}")
        if self._shared is not None:
            raise Aborted(Reason.LEASE_HELD, "another trainer shares the engine's memory")
        chosen = transport or (STREAM if why_not else SHARED)
        where = {p.spec.name: p for p in self._arenas.placements}
        session = Session(
            id=uuid.uuid4().hex,
            transport=chosen,
            reason=why_not if chosen == STREAM and not transport else "",
            tensors=tuple(tensors),
            aliased=chosen == SHARED and not any(where[t.name].alias_reason(t.dtype) for t in tensors),
        )
        if chosen == SHARED:
            session.token = secrets.token_bytes(descriptors.TOKEN_BYTES)
            self._shared = session
            self._spawn(self._expire(session))
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
        if self._shared is not None and self._shared.id == session_id and self._shared.connection:
            return self._shared
        if session_id in self._streams:
            return self._streams[session_id]
        raise NotFound(
            Reason.SESSION_NOT_FOUND, "no such session; open one anew", metadata={"session_id": session_id}
        )

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection:
            pid, uid = descriptors.peer(connection)
            token = b""
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(5):
                    while len(token) < descriptors.TOKEN_BYTES and (
                        more := await loop.sock_recv(connection, descriptors.TOKEN_BYTES - len(token))
                    ):
                        token += more
            session = self._shared
            if (
                uid not in self._uids
                or session is None
                or session.connection is not None
                or not hmac.compare_digest(token, session.token)
            ):
                log.warning("descriptors refused", pid=pid, uid=uid, tokens_match=False)
                with contextlib.suppress(OSError):
                    descriptors.refuse(connection)
                return
            session.connection = connection
            reason = "the service stopped"
            try:
                descriptors.send(connection, [arena.fd for arena in self._arenas.arenas])
                with contextlib.suppress(OSError):
                    await loop.sock_recv(
                        connection, 1
                    )  # nothing more is said: this returns when the trainer is gone
                reason = f"the trainer (process {pid}) closed its session or died"
            finally:
                self._end(session, reason)

    async def _expire(self, session: Session) -> None:
        await asyncio.sleep(ATTACH_SECONDS)
        if session.connection is None:
            self._end(session, "the trainer never fetched the descriptors")

    def _end(self, session: Session, reason: str) -> None:
        if self._shared is session:
            self._shared = None
            log.info("session ended", session=session.id, reason=reason)
        for tell in session.ended:
            tell(reason)

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
