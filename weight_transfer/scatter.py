"""Batched copies between CPU tensors, with a cast where dtypes differ: one call for a whole update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from weight_transfer import _core

_CASTABLE = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_INTEGERS = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_COPYABLE = (*_CASTABLE, *_INTEGERS, *_UNSIGNED, *_FLOAT8, torch.float8_e8m0fnu)
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _COPYABLE}

Pair = tuple[torch.Tensor, torch.Tensor]


def scatter(pairs: Sequence[Pair], *, threads: int = 0) -> int:
    """Write each source into its destination: ``(source, destination)`` of equal shape, any strides.

    float32, float16, bfloat16 and float64 cast among each other, rounding to nearest even, bit for bit as
    ``Tensor.to`` does (a NaN becomes bfloat16's 0x7fc0); every other dtype must be equal on both sides. A
    pair whose sides are the same memory in the same layout is left alone. Autograd does not see the write.

    Everything is checked before anything is written: ValueError names the pair and what is wrong with it
    (device, shape, dtype, freed storage, or memory that another tensor's write overlaps). Returns the bytes
    written. ``threads`` 0 chooses by size; the GIL is released meanwhile.
    """
    blocks: list[_Block] = []
    jobs: list[_core.Job] = []
    for index, (source, destination) in enumerate(pairs):
        reads = _block(source, index, "source")
        writes = _block(destination, index, "destination")
        _check_match(source, destination, index)
        if reads.start == writes.start and reads.steps == writes.steps and source.dtype == destination.dtype:
            continue
        if source.numel():
            blocks += reads, writes
            jobs.append(_job(source, destination))
    _refuse_overlap(blocks)
    return _core.scatter(jobs, threads)


class _Block(NamedTuple):
    """The bytes a tensor touches: from ``start`` to ``end``, rows of ``width`` every ``pitch`` bytes."""

    start: int
    end: int
    pitch: int
    width: int
    steps: list[tuple[int, int]]  # (length, stride in elements) of the dimensions along which anything moves
    pair: int
    side: str

    def overlaps(self, other: _Block) -> bool:
        """Whether both may touch one byte. Tells column blocks of one matrix apart, not odder layouts."""
        if self.end <= other.start or other.end <= self.start:
            return False
        if self.pitch != other.pitch or self.pitch == 0:
            return True
        gap = (other.start - self.start) % self.pitch
        return gap < self.width or self.pitch - gap < other.width

    def __str__(self) -> str:
        return f"pair {self.pair}'s {self.side}"


def _block(tensor: torch.Tensor, pair: int, side: str) -> _Block:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(
            f"pair {pair}: {side} is {tensor.layout} on {tensor.device}, not a strided CPU tensor"
        )
    if tensor.dtype not in _NAMES or tensor.is_neg():
        raise ValueError(f"pair {pair}: {side} of {tensor.dtype} cannot be copied as it lies in memory")
    size = tensor.itemsize
    steps = [dim for dim in zip(tensor.shape, tensor.stride(), strict=True) if dim[0] != 1]
    reach = size + sum((length - 1) * step for length, step in steps) * size if tensor.numel() else 0
    # FSDP frees a parameter by resizing its storage to nothing, which the tensor's shape does not tell.
    if reach and tensor.storage_offset() * size + reach > tensor.untyped_storage().nbytes():
        raise ValueError(f"pair {pair}: {side}'s storage was freed or shrunk under the tensor")
    length, step = max(steps, key=lambda dim: dim[1], default=(1, 0))
    start = tensor.data_ptr()
    return _Block(start, start + reach, step * size, reach - (length - 1) * step * size, steps, pair, side)


def _check_match(source: torch.Tensor, destination: torch.Tensor, pair: int) -> None:
    if source.shape != destination.shape:
        shapes = f"{list(source.shape)} is not destination shape {list(destination.shape)}"
        raise ValueError(f"pair {pair}: source shape {shapes}")
    if source.dtype != destination.dtype and not {source.dtype, destination.dtype} <= _CASTABLE:
        raise ValueError(f"pair {pair}: cannot cast {source.dtype} to {destination.dtype}")


def _refuse_overlap(blocks: list[_Block]) -> None:
    """The pairs run in no order and at once: nothing that one writes may another read or write."""
    reached: list[_Block] = []
    for block in sorted(blocks, key=lambda block: block.start):
        reached = [other for other in reached if other.end > block.start]
        for other in reached:
            if "destination" in (block.side, other.side) and block.overlaps(other):
                raise ValueError(f"{block} overlaps {other} in memory")
        reached.append(block)


def _job(source: torch.Tensor, destination: torch.Tensor) -> _core.Job:
    return (
        source.data_ptr(),
        _NAMES[source.dtype],
        source.stride(),
        destination.data_ptr(),
        _NAMES[destination.dtype],
        destination.stride(),
        destination.shape,
    )
