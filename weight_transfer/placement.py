"""Placement: where each tensor of the manifest lies in the engine's arenas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weight_transfer.manifest import ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    import torch

    from weight_transfer.arena import Arena


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides of `shape`, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to one past the last of a strided block."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


@dataclass(frozen=True)
class Block:
    """A block of a tensor and where it lies: offsets of its first element, strides in elements."""

    arena: int
    arena_offset: int  # bytes
    arena_strides: tuple[int, ...]
    tensor_offset: int  # elements
    tensor_strides: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Placement:
    """Where one tensor goes: blocks that together are the tensor. `spec` has the engine's dtype."""

    spec: TensorSpec
    blocks: tuple[Block, ...]

    def alias_reason(self, trainer_dtype: str) -> str:
        """Why a trainer's parameter of `trainer_dtype` may not become a view of the arena; "" if it may."""
        if trainer_dtype != self.spec.dtype:
            return f"the trainer's dtype is {trainer_dtype}, the engine's {self.spec.dtype}"
        if len(self.blocks) != 1:
            return f"it lies in {len(self.blocks)} blocks"
        (block,) = self.blocks
        whole = contiguous_strides(block.shape)
        if block.numel != self.spec.numel or block.tensor_offset:
            return "the engine holds a part of it"
        if block.tensor_strides != whole or block.arena_strides != whole:
            return "the engine holds it in another memory order"
        return ""

    def view(self, arenas: Sequence[Arena]) -> torch.Tensor:
        """The tensor itself, in engine memory. Only where `alias_reason` of the engine's dtype is ""."""
        import torch

        (block,) = self.blocks
        dtype = getattr(torch, self.spec.dtype)
        return arenas[block.arena].tensor(block.arena_offset, self.spec.shape, dtype)

    def pairs(self, arenas: Sequence[Arena], tensor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(part of `tensor`, its place in engine memory) for each block. `tensor` is row-major, of the spec's shape."""
        import torch

        tensor = tensor.detach().contiguous()
        dtype = getattr(torch, self.spec.dtype)
        pairs = []
        for block in self.blocks:
            source = tensor.as_strided(block.shape, block.tensor_strides, block.tensor_offset)
            extent = _extent(block.shape, block.arena_strides)
            flat = arenas[block.arena].tensor(block.arena_offset, (extent,), dtype)
            pairs.append((source, flat.as_strided(block.shape, block.arena_strides)))
        return pairs

    def gather(self, arenas: Sequence[Arena]) -> torch.Tensor:
        """The tensor as the engine holds it, shape and dtype of the spec: a view where it lies in one piece, else a copy."""
        import torch

        if not self.alias_reason(self.spec.dtype):
            return self.view(arenas)
        out = torch.empty(self.spec.shape, dtype=getattr(torch, self.spec.dtype))
        for part, place in self.pairs(arenas, out):
            part.copy_(place)
        return out


def check(placements: Sequence[Placement], arena_sizes: Sequence[int]) -> None:
    """Refuse placements that reach outside an arena or a tensor, or don't make up their tensor.

    Raises:
        ValueError: names the tensor and what is wrong. Placements come from another process, so nothing is trusted.
    """
    for placement in placements:
        spec = placement.spec
        if spec.dtype not in ITEMSIZE:
            raise ValueError(f"{spec.name}: unknown dtype {spec.dtype!r}")
        if sum(block.numel for block in placement.blocks) != spec.numel:
            raise ValueError(f"{spec.name}: its blocks don't make up its {spec.numel} elements")
        for block in placement.blocks:
            if not len(block.shape) == len(block.arena_strides) == len(block.tensor_strides):
                raise ValueError(f"{spec.name}: shape and strides of a block differ in length")
            if min(block.arena_strides + block.tensor_strides, default=0) < 0:
                raise ValueError(f"{spec.name}: negative stride")
            if not 0 <= block.arena < len(arena_sizes):
                raise ValueError(f"{spec.name}: no arena {block.arena}")
            end = block.arena_offset + _extent(block.shape, block.arena_strides) * ITEMSIZE[spec.dtype]
            if block.arena_offset < 0 or end > arena_sizes[block.arena]:
                raise ValueError(f"{spec.name}: bytes {block.arena_offset} to {end} leave the arena")
            last = block.tensor_offset + _extent(block.shape, block.tensor_strides)
            if block.tensor_offset < 0 or last > spec.numel:
                raise ValueError(f"{spec.name}: elements {block.tensor_offset} to {last} leave the tensor")
