"""Cast, scatter and digest in one pass over a CUDA device's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda import digest, kernels
from weight_transfer.placement import Block, Placement

_TILE = 1 << 14  # elements for one block
_NAMES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}

Item = tuple[Placement, torch.Tensor]
Dtypes = tuple[torch.dtype, torch.dtype]


def write(items: Sequence[Item], arenas: Sequence[Arena]) -> list[int]:
    """`weight_transfer.write.write` where arenas and tensors are on one CUDA device. Returns digest sums.

    Pieces that are rows of whole 16 bytes go through one kernel for each pair of dtypes; torch copies what is not.
    """
    device = arenas[0].device
    totals = torch.zeros(len(items), dtype=torch.int64, device=device)
    pieces: dict[Dtypes, list[list[int]]] = {}
    odd: list[int] = []
    held = []  # until the kernels have been launched: torch frees memory in the order of the stream
    for i, (placement, tensor) in enumerate(items):
        tensor = tensor.detach().contiguous()
        held.append(tensor)
        dtypes = (tensor.dtype, getattr(torch, placement.spec.dtype))
        blocks = [block for block in placement.blocks if block.numel]
        rows = [_piece(block, tensor, dtypes, arenas[block.arena].address) for block in blocks]
        if None in rows:
            odd.append(i)
        elif rows:
            pieces.setdefault(dtypes, []).extend([*row, i] for row in rows if row is not None)
    for dtypes, rows_of in pieces.items():
        _launch(dtypes, rows_of, totals)
    found = kernels.numbers(totals)
    for i in odd:
        placement, tensor = items[i]
        for part, place in placement.pairs(arenas, tensor):
            place.copy_(part)
        found[i] = digest.sums([tensor.to(getattr(torch, placement.spec.dtype))])[0]
    return found


def _launch(dtypes: Dtypes, rows: Sequence[Sequence[int]], totals: torch.Tensor) -> None:
    first, table = 0, []
    for row in rows:
        table.append([*row, first])
        first += -(-row[2] // _TILE)
    source, target = (_NAMES[dtype] for dtype in dtypes)
    function = kernels.kernel("write", SOURCE=source, TARGET=target, TILE=f"{_TILE}ULL")
    kernels.launch(function, first, totals.device, kernels.table(table, totals.device), len(rows), totals)


def _piece(block: Block, tensor: torch.Tensor, dtypes: Dtypes, arena: int) -> list[int] | None:
    """A row of the kernel's table, without tensor and first block; None where the kernel cannot take the block."""
    if not set(dtypes) <= _NAMES.keys():
        return None
    rows = _rows(block)
    source_size, size = (dtype.itemsize for dtype in dtypes)
    lanes = 16 // size
    source = tensor.data_ptr() + block.tensor_offset * source_size
    target = arena + block.arena_offset
    if rows is None or source % min(16, lanes * source_size) or target % 16:
        return None
    row, source_stride, target_stride = rows
    if any(n % lanes for n in (row, source_stride, target_stride, block.tensor_offset)):
        return None
    words = (block.tensor_offset * size // 8, source_stride * size // 8)
    return [source, target, block.numel, row, source_stride, target_stride, *words]


def _rows(block: Block) -> tuple[int, int, int] | None:
    """(length of a row, and how far, on either side, to the next) of a block that is rows; None for any other."""
    merged: list[list[int]] = []
    for length, source, target in zip(block.shape, block.tensor_strides, block.arena_strides, strict=True):
        if length == 1:
            continue
        if merged and merged[-1][1:] == [length * source, length * target]:
            merged[-1] = [merged[-1][0] * length, source, target]
        else:
            merged.append([length, source, target])
    *outer, (row, *steps) = merged or [[1, 1, 1]]
    if steps != [1, 1] or len(outer) > 1:
        return None
    return (row, outer[0][1], outer[0][2]) if outer else (row, row, row)
