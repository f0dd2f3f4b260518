"""The socket on which trainers say their tokens, and get the arenas' descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import structlog

from inference_service.folders import Folder
from weight_transfer import descriptors

log = structlog.get_logger(__name__)

TOKEN_SECONDS = 5.0
MAX_SILENT = 64  # connections that have not said their token yet

Attend = Callable[[socket.socket, int, int, bytes], Awaitable[None]]


class DescriptorSocket:
    """Hears callers of this user and of `uids`. `start` before, `stop` after."""

    def __init__(self, uids: Sequence[int], attend: Attend) -> None:
        """`attend` is given a connection, the caller's process and user, and its token: b"" of users unknown here. The
        connection is closed when it returns."""
        self._uids = {os.geteuid(), *uids}
        self._attend = attend
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent: OrderedDict[socket.socket, None] = OrderedDict()
        self._folder: Folder | None = None
        self._listener: socket.socket | None = None

    @property
    def path(self) -> str:
        """Where it is."""
        return str(self._folder.path / "descriptors.sock") if self._folder else ""

    def knows(self, uid: int) -> bool:
        """Whether callers of this user are heard."""
        return uid in self._uids

    def start(self) -> None:
        """Listen, in a folder that nobody else can enter unless `uids` may."""
        self._folder = Folder("weights")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(self.path)
        if len(self._uids) > 1:
            # The kernel tells who connects, and `_serve` asks.
            os.chmod(self.path, 0o666)  # noqa: S103
            self._folder.path.chmod(0o711)
        self._listener.listen(128)
        self.spawn(self._accept(self._listener))

    async def stop(self) -> None:
        """End what was spawned, close every connection, and remove the socket."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._silent:  # whose tasks never began
            connection.close()
        if self._listener is not None:
            self._listener.close()
        if self._folder is not None:
            self._folder.remove()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something until `stop`."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptors left, or the caller has gone: others will come
                log.exception("a connection could not be accepted")
                await asyncio.sleep(0.1)
                continue
            connection.setblocking(False)
            self._silent[connection] = None
            if len(self._silent) > MAX_SILENT:
                # A trainer speaks at once. The oldest that has not is none.
                with contextlib.suppress(OSError):
                    self._silent.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)
            self.spawn(self._serve(connection))
            await asyncio.sleep(0)  # accepting never waits while callers queue: let this one say its token

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            pid, uid = descriptors.peer(connection)
            try:
                token = await _token(connection) if self.knows(uid) else b""
            finally:
                self._silent.pop(connection, None)
            await self._attend(connection, pid, uid, token)


async def _token(connection: socket.socket) -> bytes:
    """What the caller says first: a token's length of bytes, or fewer if it stops before."""
    loop = asyncio.get_running_loop()
    token = b""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(TOKEN_SECONDS):
            while len(token) < descriptors.TOKEN_BYTES and (
                more := await loop.sock_recv(connection, descriptors.TOKEN_BYTES - len(token))
            ):
                token += more
    return token


async def departure(connection: socket.socket, pid: int) -> None:
    """Return once the other end closed the connection, or its process died.

    The connection alone doesn't tell: a child that the trainer forked holds it too.
    """
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[Any] = asyncio.ensure_future(loop.sock_recv(connection, 1))  # nothing more is said
    died: asyncio.Future[Any] = loop.create_future()
    process = None
    with contextlib.suppress(OSError):  # it is another PID namespace's, or gone
        process = os.pidfd_open(pid)
        loop.add_reader(process, died.cancel)
    try:
        await asyncio.wait({closed, died}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        closed.cancel()
        await asyncio.gather(closed, return_exceptions=True)
        if process is not None:
            loop.remove_reader(process)
            os.close(process)
