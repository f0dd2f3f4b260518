"""Part: one rank of several that write the engine's memory together. It maps the arenas that are its own alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from weight_transfer import descriptors, placement
from weight_transfer.arena import Arena
from weight_transfer.parts import first_of_each
from weight_transfer.placement import Block, Placement
from weight_transfer.transports.base import Handshake
from weight_transfer.transports.shared import device_named
from weight_transfer.write import write_parts

#: A tensor's value, or its part from that element on.
Value = tuple[torch.Tensor, int]


class Part:
    """Of each tensor it writes the blocks that lie in its own arenas.

    The connection to the descriptor socket is the session, as the other ranks' are: it is over when one closes.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        arenas: Mapping[int, Arena],
        connection: socket.socket | None = None,
    ) -> None:
        """Of an engine's placements, and those of its arenas that are ours, by index."""
        self._arenas = list(arenas.values())
        place = {index: i for i, index in enumerate(arenas)}
        self._counted: dict[str, Placement] = {}
        self._copies: dict[str, Placement] = {}  # what another rank has too, which adds it up
        for whole in placements:
            mine: tuple[list[Block], list[Block]] = ([], [])
            for block, first in zip(whole.blocks, first_of_each(whole), strict=True):
                if block.arena in place and block.numel:
                    mine[not first].append(replace(block, arena=place[block.arena]))
            self._counted[whole.spec.name] = replace(whole, blocks=tuple(mine[0]))
            self._copies[whole.spec.name] = replace(whole, blocks=tuple(mine[1]))
        self._shards: dict[tuple[str, int], tuple[Placement, Placement]] = {}
        self._connection = connection

    @classmethod
    def connect(cls, handshake: Handshake, mine: Collection[int], timeout_s: float) -> Part:
        """Fetch the arenas' descriptors and map those in `mine`. Errors are those of `open_transport`."""
        sizes = handshake.arena_sizes
        placement.check(handshake.placements, sizes)  # before anything is mapped by it
        devices = {i: device_named(handshake.arena_gpus[i]) for i in mine}
        fds, connection = descriptors.receive(
            handshake.descriptor_socket, handshake.token, len(sizes), timeout_s
        )
        try:
            arenas = {i: Arena.open(fds[i], sizes[i], device) for i, device in devices.items()}
        except BaseException:
            connection.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return cls(handshake.placements, arenas, connection)

    def write(self, values: Mapping[str, Value]) -> dict[str, int]:
        """Write our blocks of these tensors. Returns the digest sum of those that no rank before us has, of each.

        Holds a cast copy of one at a time where they are in host memory.
        """
        if not self._arenas:
            return dict.fromkeys(values, 0)
        counted, copies = [], []
        for name, (tensor, first) in values.items():
            one, other = self._placed(name, first)
            counted.append((one, tensor.detach()))
            if other.blocks:
                copies.append((other, tensor.detach()))
        sums = write_parts([*counted, *copies], self._arenas)
        return dict(zip(values, sums, strict=False))

    def _placed(self, name: str, first: int) -> tuple[Placement, Placement]:
        """Kept, so that they are the very same for each update."""
        both = self._counted[name], self._copies[name]
        if first:
            of_shard = replace(both[0], first=first), replace(both[1], first=first)
            both = self._shards.setdefault((name, first), of_shard)
        return both

    def synchronize(self) -> None:
        """Return once what was written, by whomever in this process, is in the engine's memory."""
        for device in {arena.device for arena in self._arenas if arena.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def close(self) -> None:
        """Let go of the engine's memory, and end the session."""
        self._arenas.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
