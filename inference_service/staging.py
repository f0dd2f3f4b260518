"""Where a streamed update's bytes wait, beside the live weights, until they are all there."""

from __future__ import annotations

import torch

from tandem.errors import FailedPrecondition, Reason, Violation, invalid
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest


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
        if tensor >= len(self._manifest):
            raise invalid("chunk.tensor", f"the manifest has {len(self._manifest)} tensors, not {tensor + 1}")
        spec, have = self._manifest.tensors[tensor], self._received[tensor]
        if offset != have:
            raise FailedPrecondition(
                Reason.UPDATE_ORDER, f"{spec.name}: chunk at byte {offset}, but byte {have} is next"
            )
        if offset + len(data) > spec.nbytes:
            raise invalid("chunk.data", f"{spec.name} has {spec.nbytes} bytes, not {offset + len(data)}")
        start = self._offsets[tensor] + offset
        self._bytes[start : start + len(data)] = data
        self._received[tensor] = have + len(data)

    def complete(self) -> list[torch.Tensor]:
        """The tensors, in the manifest's order.

        Raises:
            FailedPrecondition: UPDATE_ORDER, naming every tensor of which bytes are missing.
        """
        missing = [
            Violation(spec.name, f"{have} of {spec.nbytes} bytes arrived")
            for spec, have in zip(self._manifest, self._received, strict=True)
            if have != spec.nbytes
        ]
        if missing:
            raise FailedPrecondition(
                Reason.UPDATE_ORDER, f"{len(missing)} tensors are incomplete", violations=missing
            )
        return self._tensors()

    def digest(self) -> int:
        """Digest of the policy as it was received."""
        return combine(digest_tensors(self._tensors()))

    def release(self) -> None:
        """Give the memory back now: the traceback of an update that failed may keep this object for long."""
        self._bytes = memoryview(b"")
        del self.arena

    def _tensors(self) -> list[torch.Tensor]:
        return tensors_in(self.arena, self._manifest)


def tensors_in(arena: Arena, manifest: Manifest) -> list[torch.Tensor]:
    """The tensors of a staging arena, in the manifest's order."""
    return [
        arena.tensor(offset, spec.shape, getattr(torch, spec.dtype))
        for offset, spec in zip(manifest.offsets, manifest, strict=False)
    ]
