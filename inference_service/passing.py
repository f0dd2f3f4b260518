"""Descriptors between the service and its workers, over a Unix socket that exists for one call."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from inference_service.folders import Folder
from weight_transfer import descriptors

_SECONDS = 10


@asynccontextmanager
async def collected() -> AsyncIterator[tuple[str, dict[int, list[int]]]]:
    """A path where workers `give`, and the descriptors by rank. They are all there when the block ends."""
    received: dict[int, list[int]] = {}

    def receive(connection: socket.socket) -> None:
        rank = int.from_bytes(connection.recv(4), "little")
        _, received[rank], _ = descriptors.receive_descriptors(connection)
        connection.send(descriptors.OK)

    async with _listening(receive) as path:
        yield path, received


@asynccontextmanager
async def offered(fds: Sequence[int]) -> AsyncIterator[str]:
    """A path where workers `take` these descriptors."""
    async with _listening(lambda connection: descriptors.send(connection, list(fds))) as path:
        yield path


def give(path: str, rank: int, fds: Sequence[int]) -> None:
    """In a worker: hand descriptors to the service."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
        connection.sendall(rank.to_bytes(4, "little"))
        descriptors.send(connection, list(fds))
        connection.recv(1)  # the service has them


def take(path: str) -> list[int]:
    """In a worker: descriptors from the service, the caller's to close."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
        return descriptors.receive_descriptors(connection)[1]


@asynccontextmanager
async def _listening(answer: Callable[[socket.socket], None]) -> AsyncIterator[str]:
    folder = Folder("workers")
    path = str(folder.path / "workers.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # shut down: every worker has answered
                return
            with connection:
                connection.settimeout(_SECONDS)
                answer(connection)

    try:
        listener.bind(path)
        listener.listen(16)
        serving = asyncio.get_running_loop().run_in_executor(None, serve)
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            await serving
    finally:
        listener.close()
        folder.remove()
