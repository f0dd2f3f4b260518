"""The engine's arenas as the service sees them: mapped here too, to stage, digest and hand on to trainers."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any

from inference_service.engine import Engine
from weight_transfer import descriptors
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, check
from weight_transfer.scatter import scatter


@dataclass
class EngineArenas:
    """All workers' arenas, and where each tensor of the manifest lies in them, in the manifest's order.

    Empty, with `reason`, where the engine's weights are not in arenas: then nobody can update them.
    """

    arenas: list[Arena] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    reloads: bool = False
    reason: str = ""

    @property
    def manifest(self) -> Manifest:
        return Manifest(tuple(p.spec for p in self.placements))

    def digest(self) -> int:
        """Digest of the whole policy as the engine holds it. Reads every byte."""
        return combine(digest_tensors([p.gather(self.arenas) for p in self.placements]))

    def write(self, tensors: list[Any]) -> None:
        """Scatter `tensors`, in the manifest's order, dtypes and shapes, into the engine's memory."""
        pairs = zip(self.placements, tensors, strict=True)
        scatter([pair for placement, tensor in pairs for pair in placement.pairs(self.arenas, tensor)])


async def collect(engine: Engine) -> EngineArenas:
    """Have each worker send the descriptors of its arenas, and say what lies where."""
    folder = tempfile.mkdtemp(prefix="tandem-")
    path = os.path.join(folder, "workers.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(16)
        received: dict[int, list[int]] = {}
        stop = asyncio.get_running_loop().run_in_executor(None, _receive, listener, received)
        try:
            answers = await engine.call_workers("tandem_export", path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            await stop
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
    return _merge(answers, received)


def _receive(listener: socket.socket, received: dict[int, list[int]]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down: every worker has answered
            return
        with connection:
            connection.settimeout(10)
            rank = int.from_bytes(connection.recv(4), "little")
            _, received[rank], _ = descriptors.receive_descriptors(connection)
            connection.send(descriptors.OK)


def _merge(answers: list[dict[str, Any]], received: dict[int, list[int]]) -> EngineArenas:
    merged = EngineArenas()
    blocks: dict[str, Placement] = {}
    for answer in sorted(answers, key=lambda a: a["rank"]):
        first = len(merged.arenas)
        for fd, size in zip(received[answer["rank"]], answer["arenas"], strict=True):
            merged.arenas.append(Arena.open(fd, size))
            os.close(fd)
        merged.reloads |= bool(answer["reloaded"])
        for name, dtype, shape, raw in answer["placements"]:
            spec = TensorSpec(name, dtype, tuple(shape))
            found = tuple(Block(first + b[0], b[1], tuple(b[2]), b[3], tuple(b[4]), tuple(b[5])) for b in raw)
            before = blocks.setdefault(name, Placement(spec, ()))
            blocks[name] = replace(before, blocks=before.blocks + found)
    merged.placements = [blocks[name] for name in sorted(blocks)]
    if reason := next((answer["reason"] for answer in answers if answer["reason"]), ""):
        return EngineArenas(reason=reason)
    try:
        check(merged.placements, [arena.size for arena in merged.arenas])
    except ValueError as error:  # it serves, and cannot be updated
        return EngineArenas(reason=f"the ranks don't hold the whole model: {error}")
    return merged
