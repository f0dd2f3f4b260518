"""Placement: where each tensor of the manifest lies in the engine's arenas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weight_transfer.manifest import ITEMSIZE, Manifest, TensorSpec

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


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
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
    """Where one tensor goes: blocks that together are the tensor. `spec` has the engine's dtype.

    A rank's part of that has its blocks alone, and may be written from the rank's shard of the tensor, which then
    stands for the tensor here: `first` is the place of its first element in the whole.
    """

    spec: TensorSpec
    blocks: tuple[Block, ...]
    first: int = 0

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
        """(part of `tensor`, its place in engine memory) of each block. `tensor` has the spec's shape."""
        return list(zip(self.parts(tensor.detach().contiguous()), self.places(arenas), strict=True))

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each block has of `tensor`, which is contiguous and of the spec's shape, or a shard from `first` on."""
        first = tensor.storage_offset() - self.first  # as_strided counts from the storage's start
        return [
            tensor.as_strided(block.shape, block.tensor_strides, first + block.tensor_offset)
            for block in self.blocks
        ]

    def places(self, arenas: Sequence[Arena]) -> list[torch.Tensor]:
        """Each block's place in engine memory."""
        import torch

        dtype = getattr(torch, self.spec.dtype)
        found = []
        for block in self.blocks:
            reach = extent(block.shape, block.arena_strides)
            flat = arenas[block.arena].tensor(block.arena_offset, (reach,), dtype)
            found.append(flat.as_strided(block.shape, block.arena_strides))
        return found

    def gather(self, arenas: Sequence[Arena]) -> torch.Tensor:
        """The tensor as the engine holds it: a view where it lies in one piece, else a copy."""
        import torch

        if not self.alias_reason(self.spec.dtype):
            return self.view(arenas)
        device = arenas[self.blocks[0].arena].device if self.blocks else None
        out = torch.empty(self.spec.shape, dtype=getattr(torch, self.spec.dtype), device=device)
        for part, place in self.pairs(arenas, out):
            part.copy_(place)
        return out


def packed(manifest: Manifest) -> list[Placement]:
    """All tensors one after the other in one arena, of `manifest.offsets[-1]` bytes, in the manifest's order."""
    return [
        Placement(spec, (Block(0, offset, strides, 0, strides, spec.shape),))
        for offset, spec in zip(manifest.offsets, manifest, strict=False)
        for strides in [contiguous_strides(spec.shape)]
    ]


def merged(blocks: Sequence[Block], itemsize: int) -> tuple[Block, ...]:
    """`blocks`, of which those that continue one another, in the tensor and in the arena, are one.

    Some engines copy a tensor shard by shard into one parameter, in which they then lie as they did in the tensor.
    """
    found: list[Block] = []
    for block in sorted(blocks, key=lambda block: (block.arena, block.tensor_offset)):
        if found and _continues(found[-1], block, itemsize):
            last = found[-1]
            found[-1] = replace(last, shape=(last.shape[0] + block.shape[0], *last.shape[1:]))
        else:
            found.append(block)
    return tuple(found)


def _continues(last: Block, block: Block, itemsize: int) -> bool:
    if not last.shape or last.shape[1:] != block.shape[1:]:
        return False
    dense = contiguous_strides(last.shape)
    if {last.arena_strides, last.tensor_strides, block.arena_strides, block.tensor_strides} != {dense}:
        return False
    return (
        block.arena == last.arena
        and block.tensor_offset == last.tensor_offset + last.numel
        and block.arena_offset == last.arena_offset + last.numel * itemsize
    )


def check(placements: Sequence[Placement], arena_sizes: Sequence[int]) -> None:
    """Refuse placements that reach outside an arena or a tensor, or don't make up their tensor.

    Raises:
        ValueError: names the tensor and what is wrong. They come from another process: nothing is trusted.
    """
    for placement in placements:
        spec = placement.spec
        if spec.dtype not in ITEMSIZE:
            raise ValueError(f"{spec.name}: unknown dtype {spec.dtype!r}")
        if min(spec.shape, default=0) < 0:
            raise ValueError(f"{spec.name}: negative shape")
        for block in placement.blocks:
            _check_block(spec, block, arena_sizes)
        if not covered(spec, placement.blocks):
            raise ValueError(f"{spec.name}: its blocks don't make up its {spec.numel} elements")


def _check_block(spec: TensorSpec, block: Block, arena_sizes: Sequence[int]) -> None:
    if not len(block.shape) == len(block.arena_strides) == len(block.tensor_strides):
        raise ValueError(f"{spec.name}: shape and strides of a block differ in length")
    numbers = (block.arena_offset, block.tensor_offset, *block.arena_strides, *block.tensor_strides)
    if max(numbers + block.shape) >= 2**63:
        raise ValueError(f"{spec.name}: {max(numbers + block.shape)} is beyond any memory")
    if min(block.shape, default=0) < 0:
        raise ValueError(f"{spec.name}: negative shape")
    if min(block.arena_strides + block.tensor_strides, default=0) < 0:
        raise ValueError(f"{spec.name}: negative stride")
    if not 0 <= block.arena < len(arena_sizes):
        raise ValueError(f"{spec.name}: no arena {block.arena}")
    itemsize = ITEMSIZE[spec.dtype]
    if block.arena_offset % itemsize:
        raise ValueError(f"{spec.name}: byte {block.arena_offset} is no place for a {spec.dtype}")
    end = block.arena_offset + extent(block.shape, block.arena_strides) * itemsize
    if block.arena_offset < 0 or end > arena_sizes[block.arena]:
        raise ValueError(f"{spec.name}: bytes {block.arena_offset} to {end} leave the arena")
    last = block.tensor_offset + extent(block.shape, block.tensor_strides)
    if block.tensor_offset < 0 or last > spec.numel:
        raise ValueError(f"{spec.name}: elements {block.tensor_offset} to {last} leave the tensor")
    for strides in (block.arena_strides, block.tensor_strides):
        if _overlaps_itself(block.shape, strides):
            raise ValueError(f"{spec.name}: a block has two elements in one place")


def _steps(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(stride, length) of the dimensions along which anything moves, the smallest stride first."""
    return sorted((stride, length) for stride, length in zip(strides, shape, strict=True) if length != 1)


def _overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    # Strides that interleave without a collision exist, and no tensor has them.
    reach = 1
    for stride, length in _steps(shape, strides):
        if stride < reach:
            return 0 not in shape
        reach += (length - 1) * stride
    return False


def covered(spec: TensorSpec, blocks: Sequence[Block]) -> bool:
    """Whether each element of the tensor is in some block. Ranks may hold the same ones."""
    if sum(block.numel for block in blocks) < spec.numel:
        return False
    if not spec.numel or any(block.numel == spec.numel for block in blocks):  # none has an element twice
        return True
    # Marked in units that each block has or lacks as a whole: a few for each row, not one for each element.
    import numpy as np

    parts = [(block.tensor_offset, *runs(block)) for block in blocks if block.numel]
    unit = math.gcd(
        spec.numel, *(n for first, run, rest in parts for n in (first, run, *(s for s, _ in rest)))
    )
    marks = np.zeros(spec.numel // unit, bool)
    for first, run, rest in parts:
        shape = [*(length for _, length in rest), run // unit]
        strides = [*(stride // unit for stride, _ in rest), 1]
        np.lib.stride_tricks.as_strided(marks[first // unit :], shape, strides)[...] = True
    return bool(marks.all())


def runs(block: Block) -> tuple[int, list[tuple[int, int]]]:
    """(n, steps): the block takes runs of `n` elements of its tensor, at `steps` as `_steps` has them."""
    run, rest = 1, _steps(block.shape, block.tensor_strides)
    while rest and rest[0][0] == run:
        run *= rest.pop(0)[1]
    return run, rest
