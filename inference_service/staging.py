"""Where a staged update's bytes wait, beside the live weights, until they are all there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from inference_service import passing
from tandem.errors import FailedPrecondition, Reason, Violation, invalid
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Placement, packed
from weight_transfer.write import copy

#: Of a device's memory that an install needs beside the weights.
PIECE_BYTES = 32 << 20


class Staging:
    """Room for one whole policy in the engine's dtypes. Its pages come as bytes arrive."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._offsets = manifest.offsets
        # An arena, so that a worker can read it: a GPU's memory is written there.
        self.arena = Arena.create("tandem-staging", max(manifest.offsets[-1], 1))
        self._bytes = memoryview(self.arena.tensor(0, (self.arena.size,), torch.uint8).numpy())  # type: ignore[arg-type]
        self._received = [0] * len(manifest)

    def add(self, tensor: int, offset: int, data: bytes) -> None:
        """Take a piece of a tensor. Those of one tensor come in order, without gaps; tensors in any order."""
        next_piece(self._manifest, self._received, tensor, offset, len(data))
        start = self._offsets[tensor] + offset
        self._bytes[start : start + len(data)] = data
        self._received[tensor] = offset + len(data)

    def complete(self) -> list[torch.Tensor]:
        """The tensors, in the manifest's order.

        Raises:
            FailedPrecondition: UPDATE_ORDER, naming every tensor of which bytes are missing.
        """
        require_all(self._manifest, self._received)
        return self._tensors()

    def digest(self) -> int:
        """Digest of the policy as it was received."""
        return combine(digest_tensors(self._tensors()))

    def forget(self) -> None:
        """Give the pages back, which takes its time. From any thread; nothing is read or written meanwhile."""
        self.arena.forget()

    def release(self) -> None:
        """Give the memory back now: the traceback of an update that failed may keep this object for long."""
        self._bytes = memoryview(b"")
        del self.arena

    def _tensors(self) -> list[torch.Tensor]:
        return tensors_in(self.arena, self._manifest)


class MappedStaging(Staging):
    """One that a trainer on this host has mapped too, and writes by itself, in any order, update after update."""

    _used = _over = False

    def use(self) -> None:
        """An update begins, which will `release` it."""
        self._used = True

    def close(self) -> None:
        """The trainer is gone: give the memory back, now or when the update under way is over."""
        self._over = True
        if not self._used:
            super().release()

    @property
    def placements(self) -> list[Placement]:
        """Where it writes each tensor of the manifest: arena 0."""
        return packed(self._manifest)

    def complete(self) -> list[torch.Tensor]:
        """The tensors, whatever was written: the digest tells."""
        return self._tensors()

    def release(self) -> None:
        """The update is over. The pages that `forget` gave back come again with the next, as both have them mapped."""
        self._used = False
        if self._over:
            super().release()


def taken(path: str, size: int) -> Arena:
    """The staging arena that the service offers at `path`."""
    (fd,) = passing.take(path)
    try:
        return Arena.open(fd, size)
    finally:
        os.close(fd)


def unstage(
    staged: Arena, offsets: Mapping[str, int], placements: Sequence[Placement], arenas: Sequence[Arena]
) -> None:
    """Write a staging arena's tensors to their places in an engine's arenas.

    By way of little of a device's memory, piece by piece: the KV cache may have the rest, and by now nothing may fail.
    """
    for placement in placements:
        spec = placement.spec
        tensor = staged.tensor(offsets[spec.name], spec.shape, getattr(torch, spec.dtype))
        for source, place in placement.pairs(arenas, tensor):
            for part, there in zip(_pieces(source), _pieces(place), strict=True):
                copy([(part.to(there.device), there)])


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Rows of it, as many at once as `PIECE_BYTES` has room for, or one."""
    if tensor.nbytes <= PIECE_BYTES or not tensor.ndim:
        return [tensor]
    rows = max(1, PIECE_BYTES * len(tensor) // tensor.nbytes)
    return [tensor[at : at + rows] for at in range(0, len(tensor), rows)]


def next_piece(
    manifest: Manifest, received: Sequence[int], tensor: int, offset: int, length: int
) -> TensorSpec:
    """The tensor of which a piece came, where it is the next of those of which `received` bytes came.

    Raises:
        InvalidArgument: no such tensor, or past its end. FailedPrecondition: UPDATE_ORDER.
    """
    if tensor >= len(manifest):
        raise invalid("chunk.tensor", f"the manifest has {len(manifest)} tensors, not {tensor + 1}")
    spec, have = manifest.tensors[tensor], received[tensor]
    if offset != have:
        raise FailedPrecondition(
            Reason.UPDATE_ORDER, f"{spec.name}: chunk at byte {offset}, but byte {have} is next"
        )
    if offset + length > spec.nbytes:
        raise invalid("chunk.data", f"{spec.name} has {spec.nbytes} bytes, not {offset + length}")
    return spec


def require_all(manifest: Manifest, received: Sequence[int], *, partial: bool = False) -> None:
    """See that each tensor came whole; where the update is `partial`, whole or not at all.

    Raises:
        FailedPrecondition: UPDATE_ORDER, naming every tensor of which bytes are missing.
    """
    missing = [
        Violation(spec.name, f"{have} of {spec.nbytes} bytes arrived")
        for spec, have in zip(manifest, received, strict=True)
        if have != spec.nbytes and (have or not partial)
    ]
    if missing:
        raise FailedPrecondition(
            Reason.UPDATE_ORDER, f"{len(missing)} tensors are incomplete", violations=missing
        )


def tensors_in(arena: Arena, manifest: Manifest) -> list[torch.Tensor]:
    """The tensors of a staging arena, in the manifest's order."""
    return [
        arena.tensor(offset, spec.shape, getattr(torch, spec.dtype))
        for offset, spec in zip(manifest.offsets, manifest, strict=False)
    ]
