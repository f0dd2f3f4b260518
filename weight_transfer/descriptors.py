"""Passing an arena's descriptors over a Unix socket, to a process of the same user and no other.

The caller sends a fixed-length token that a handshake gave it; the answer is one status byte, with the
descriptors attached where it is OK. The connection then stays open, and is the session: it ends when either
side closes it or dies, which the kernel tells the other side at once.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import time

TOKEN_BYTES = 32
MAX_DESCRIPTORS = 64
OK, REFUSED = b"\x01", b"\x00"
_UCRED = struct.Struct("3i")


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as the kernel recorded them when it connected."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def send(connection: socket.socket, descriptors: list[int]) -> None:
    """Answer OK with `descriptors`."""
    socket.send_fds(connection, [OK], descriptors)


def refuse(connection: socket.socket) -> None:
    """Answer no."""
    connection.send(REFUSED)


def receive(path: str, token: bytes, count: int, timeout: float) -> tuple[list[int], socket.socket]:
    """Ask at `path` for `count` descriptors.

    Returns the descriptors, which the caller owns, and the connection, which is the session: keep it open.

    Raises:
        PermissionError: the token was refused, or the answer is not what the protocol says.
        OSError: nobody answers at `path`; TimeoutError: not within `timeout` seconds.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptors: list[int] = []
    try:
        _connect(connection, path, timeout)
        if (uid := peer(connection)[1]) not in (os.geteuid(), 0):
            raise PermissionError(f"the process at {path} belongs to uid {uid}, not to {os.geteuid()}")
        with contextlib.suppress(BrokenPipeError):  # refused unheard: the answer is there
            connection.sendall(token)
        answer, descriptors, flags = receive_descriptors(connection)
        if answer != OK or len(descriptors) != count or flags & socket.MSG_CTRUNC:
            raise PermissionError(
                f"{path} gave no descriptors" if answer == REFUSED else f"{path} answered out of protocol"
            )
        connection.settimeout(None)
        return descriptors, connection
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        raise


def _connect(connection: socket.socket, path: str, timeout: float) -> None:
    connection.settimeout(timeout)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return connection.connect(path)
        except BlockingIOError:  # the listener's queue is full, and the kernel doesn't wait for room in it
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is busy") from None
            time.sleep(0.01)
        except FileNotFoundError:
            hint = "no such socket here; containers must share the service's folder for temporary files"
            raise FileNotFoundError(errno.ENOENT, hint, path) from None


def receive_descriptors(connection: socket.socket) -> tuple[bytes, list[int], int]:
    """(status, descriptors, flags) of one answer."""
    # socket.recv_fds can't ask for close-on-exec: a child that inherited a descriptor would keep the arena.
    fds = array.array("i")
    answer, ancillary, flags, _ = connection.recvmsg(
        1, socket.CMSG_SPACE(MAX_DESCRIPTORS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return answer, list(fds), flags
