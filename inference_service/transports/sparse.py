"""Sparse: the elements that changed come by stream. What does not come stays as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from inference_service.arenas import HostArenas
from inference_service.memory import HEADROOM, free_bytes
from inference_service.staging import next_piece, require_all
from inference_service.transports.base import Incoming, compare
from tandem.errors import FailedPrecondition, Reason, invalid
from weight_transfer.digest import combine, digest_tensor, digest_tensors
from weight_transfer.manifest import ITEMSIZE, Manifest
from weight_transfer.sparse import Changes, Packed, bits, unpack
from weight_transfer.write import copy

#: What one message may unpack to: no more than the largest chunk that any service takes.
MAX_UNPACKED = 1 << 26


class Unpacking:
    """The elements that changed, checked as they come: of each tensor in rising order, and of none that comes whole."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._next: dict[int, int] = {}  # the element that may come next, of each tensor that has changes

    def next(self, packed: Packed, received: Sequence[int]) -> Changes:
        """Unpack what came next, after `received` bytes of each tensor that comes whole.

        Raises:
            InvalidArgument: no such tensor, or not its elements. FailedPrecondition: UPDATE_ORDER.
        """
        if packed.tensor >= len(self._manifest):
            raise invalid(
                "sparse.tensor", f"the manifest has {len(self._manifest)} tensors, not {packed.tensor + 1}"
            )
        spec = self._manifest.tensors[packed.tensor]
        if received[packed.tensor]:
            raise FailedPrecondition(Reason.UPDATE_ORDER, f"{spec.name}: it comes whole, and in elements too")
        if packed.first < (first := self._next.get(packed.tensor, 0)):
            raise FailedPrecondition(
                Reason.UPDATE_ORDER, f"{spec.name}: element {packed.first} comes after {first - 1}"
            )
        try:
            changes = unpack(packed, spec.numel, ITEMSIZE[spec.dtype], MAX_UNPACKED)
        except ValueError as error:
            raise invalid("sparse", f"{spec.name}: {error}") from error
        self._next[packed.tensor] = int(changes.indices[-1]) + 1
        return changes

    def none_of(self, tensor: int) -> None:
        """Raise FailedPrecondition(UPDATE_ORDER) where elements of a tensor came before."""
        if tensor in self._next:
            name = self._manifest.tensors[tensor].name
            raise FailedPrecondition(Reason.UPDATE_ORDER, f"{name}: it comes whole, and in elements too")


class SparseStaged(Incoming):
    """The elements themselves are what is staged. What they replace is kept from the check to the update's end, and put
    back where it fails; what whole tensors replace, only where the host has that memory free.

    Needs memory for the elements, their places and what was there, and for one tensor at a time while it digests.
    """

    def __init__(self, arenas: HostArenas) -> None:
        self._arenas = arenas
        self._manifest = arenas.manifest
        self._received = [0] * len(self._manifest)
        self._unpacking = Unpacking(self._manifest)
        self._whole: dict[int, torch.Tensor] = {}
        self._changes: dict[int, list[Changes]] = {}
        self._before: dict[int, torch.Tensor] = {}  # the whole ones, and the bits of elements
        self._kept = True

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        spec = next_piece(self._manifest, self._received, tensor, offset, len(data))
        self._unpacking.none_of(tensor)
        value = self._whole.get(tensor)
        if value is None:
            value = self._whole[tensor] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        if data:
            raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            value.view(-1).view(torch.uint8)[offset : offset + len(data)] = raw
        self._received[tensor] = offset + len(data)

    def changes(self, packed: Packed) -> None:
        changes = self._unpacking.next(packed, self._received)
        self._changes.setdefault(changes.tensor, []).append(changes)

    async def check(self, digest: int | None) -> None:
        require_all(self._manifest, self._received, partial=True)
        self._changes = {tensor: [_joined(parts)] for tensor, parts in self._changes.items()}
        compare(digest, await asyncio.to_thread(self._digest))

    async def install(self) -> None:
        new = {i: changes.values for i, (changes,) in self._changes.items()}
        await asyncio.to_thread(self._place, self._whole | new)

    async def undo(self) -> bool:
        if self._kept:
            await asyncio.to_thread(self._place, self._before)
        return self._kept

    def release(self) -> None:
        for held in (self._whole, self._changes, self._before):
            held.clear()

    def _digest(self) -> int:
        """Of the whole policy as it will be. Keeps what that replaces, while generation still goes on."""
        placements, arenas = self._arenas.placements, self._arenas.arenas
        parts = [0] * len(self._manifest)
        same = [i for i in range(len(parts)) if i not in self._whole and i not in self._changes]
        at_once = [i for i in same if not placements[i].alias_reason(placements[i].spec.dtype)]
        for i, found in zip(
            at_once, digest_tensors([placements[i].view(arenas) for i in at_once]), strict=True
        ):
            parts[i] = found
        for i in set(same) - set(at_once):
            parts[i] = digest_tensor(placements[i].gather(arenas))
        if self._whole:
            self._kept = sum(value.nbytes for value in self._whole.values()) + HEADROOM <= free_bytes()
        for i, value in self._whole.items():
            parts[i] = digest_tensor(value)
            if self._kept:
                self._before[i] = placements[i].gather(arenas).clone()
        # One piece of memory for all: the system takes longer to give it than it takes to read the tensor.
        largest = max((self._manifest.tensors[i].nbytes for i in self._changes), default=0)
        room = torch.empty(largest, dtype=torch.uint8)
        for i, (changes,) in self._changes.items():
            spec = self._manifest.tensors[i]
            value = room[: spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)
            value.copy_(placements[i].gather(arenas))
            self._before[i] = bits(value).index_select(0, changes.indices)
            bits(value).scatter_(0, changes.indices, changes.values)
            parts[i] = digest_tensor(value)
        return combine(parts)

    def _place(self, values: dict[int, torch.Tensor]) -> None:
        """Write what is given of each tensor: all of it where it came whole, else the elements that came."""
        placements, arenas = self._arenas.placements, self._arenas.arenas
        copy([pair for i in self._whole for pair in placements[i].pairs(arenas, values[i])])
        for i, (changes,) in self._changes.items():
            value = placements[i].gather(arenas)
            bits(value).scatter_(0, changes.indices, values[i])
            if placements[i].alias_reason(placements[i].spec.dtype):  # that was a copy
                copy(placements[i].pairs(arenas, value))


def _joined(parts: Sequence[Changes]) -> Changes:
    if len(parts) == 1:
        return parts[0]
    tensor = parts[0].tensor
    return Changes(tensor, torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))
