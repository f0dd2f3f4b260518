"""Stream: the bytes come in the update's own stream, and are staged or written as they come."""

from __future__ import annotations

import asyncio

import torch

from inference_service.arenas import EngineArenas, HostArenas
from inference_service.staging import Staging, next_piece, require_all
from inference_service.transports.base import Incoming, compare
from inference_service.transports.sparse import Unpacking
from weight_transfer.sparse import Packed, bits
from weight_transfer.write import copy


class StreamStaged(Incoming):
    """Beside the live weights, until all is there."""

    def __init__(self, arenas: EngineArenas) -> None:
        self._arenas = arenas
        self._staging = Staging(arenas.manifest)

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        self._staging.add(tensor, offset, data)

    async def check(self, digest: int | None) -> None:
        self._staging.complete()
        compare(digest, await asyncio.to_thread(self._staging.digest))

    async def install(self) -> None:
        await self._arenas.write_staged(self._staging)

    def release(self) -> None:
        """What is staged takes longer."""

    async def give_back(self) -> None:
        await asyncio.to_thread(self._staging.forget)
        self._staging.release()


class StreamInPlace(Incoming):
    """Straight into the live weights, in the host's memory. A tensor that lies there in pieces waits until it is whole.

    In a partial update a tensor comes whole, or as elements that changed, or not at all.
    """

    writes = True

    def __init__(self, arenas: HostArenas, *, partial: bool) -> None:
        self._arenas = arenas
        self._manifest = arenas.manifest
        self._received = [0] * len(self._manifest)
        self._waiting: dict[int, torch.Tensor] = {}
        self._unpacking = Unpacking(self._manifest) if partial else None

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        spec = next_piece(self._manifest, self._received, tensor, offset, len(data))
        if self._unpacking is not None:
            self._unpacking.none_of(tensor)
        self.touched = True
        placement = self._arenas.placements[tensor]
        whole = not placement.alias_reason(spec.dtype)
        if whole:
            place = placement.view(self._arenas.arenas)
        else:
            empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            place = self._waiting.setdefault(tensor, empty)
        if data:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            place.view(-1).view(torch.uint8)[offset : offset + len(data)] = raw
        self._received[tensor] = offset + len(data)
        if not whole and self._received[tensor] == spec.nbytes:
            copy(placement.pairs(self._arenas.arenas, self._waiting.pop(tensor)))

    def changes(self, packed: Packed) -> None:
        if self._unpacking is None:
            return super().changes(packed)
        changes = self._unpacking.next(packed, self._received)
        self.touched = True
        placement = self._arenas.placements[changes.tensor]
        value = placement.gather(self._arenas.arenas)
        bits(value).scatter_(0, changes.indices, changes.values)
        if placement.alias_reason(placement.spec.dtype):  # that was a copy
            copy(placement.pairs(self._arenas.arenas, value))
        return None

    async def check(self, digest: int | None) -> None:
        require_all(self._manifest, self._received, partial=self._unpacking is not None)
        compare(digest, await self._arenas.find_digest())

    async def install(self) -> None:
        """It is there."""

    def release(self) -> None:
        self._waiting.clear()
