"""Cast, scatter and digest in one pass over a CUDA device's memory."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda import kernels
from weight_transfer.digest import digest_tensor, finished
from weight_transfer.parts import sum_of
from weight_transfer.placement import Block, Placement

_TILE = 1 << 15  # elements for one block
_NAMES = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}
_KEPT = 256  # plans: a window of an update each, where those go one by one
_dtype_of = operator.attrgetter("dtype")

Item = tuple[Placement, torch.Tensor]
Dtypes = tuple[torch.dtype, torch.dtype]


def write(items: Sequence[Item], arenas: Sequence[Arena]) -> list[int]:
    """`weight_transfer.write.write` where arenas and tensors are on one CUDA device.

    Pieces that are rows of whole units of the kernel's go through one launch for each pair of dtypes; torch copies
    what is not.
    """
    items = _contiguous(items)
    plan = _plan_for(items, arenas)
    found = plan.write()
    for i, _, cast in plan.copied(items, arenas):
        found[i] = digest_tensor(cast)
    return found


def write_parts(items: Sequence[Item], arenas: Sequence[Arena]) -> list[int]:
    """`weight_transfer.write.write_parts`, likewise."""
    items = _contiguous(items)
    plan = _plan_for(items, arenas)
    found = [total % 2**64 for total in plan.launch().tolist()]
    for i, placement, cast in plan.copied(items, arenas):
        found[i] = sum_of(placement, cast)
    return found


def _contiguous(items: Sequence[Item]) -> Sequence[Item]:
    if all(tensor.is_contiguous() for _, tensor in items):
        return items
    return [(placement, tensor.contiguous()) for placement, tensor in items]


def again(items: Sequence[Item], arenas: Sequence[Arena]) -> Callable[[], list[int]] | None:
    """`write` of the same items, with no more work of the host's than there must be. Holds none of the tensors: good
    as long as each is where it is. None where some of them need more than the kernel.
    """
    if not all(tensor.is_contiguous() for _, tensor in items):
        return None
    plan = _plan_for(items, arenas)
    return None if plan.odd else plan.write


def scattering(items: Sequence[Item], arenas: Sequence[Arena]) -> Callable[[], None]:
    """`weight_transfer.write.scattering` where arenas and tensors are on one CUDA device."""
    if not items:
        return lambda: None
    plan = _Plan(items, arenas)
    odd = [pair for i in plan.odd for pair in items[i][0].pairs(arenas, items[i][1])]

    def scatter() -> None:
        plan.launch()
        for part, place in odd:
            place.copy_(part, non_blocking=True)

    return scatter


class _Plan:
    """Where the pieces of some tensors lie and go. Good for all tensors at the same addresses."""

    def __init__(self, items: Sequence[Item], arenas: Sequence[Arena]) -> None:
        self._placements = [placement for placement, _ in items]  # their ids are in the plan's key
        self._nbytes = np.array([placement.spec.nbytes for placement, _ in items], np.uint64)
        pieces: dict[Dtypes, list[list[int]]] = {}
        self.odd: list[int] = []
        for i, (placement, tensor) in enumerate(items):
            dtypes = (tensor.dtype, getattr(torch, placement.spec.dtype))
            blocks = [block for block in placement.blocks if block.numel]
            rows = [
                _piece(block, tensor, dtypes, arenas[block.arena].address, placement.first)
                for block in blocks
            ]
            if None in rows:
                self.odd.append(i)
            elif rows:
                pieces.setdefault(dtypes, []).extend([*row, i] for row in rows if row is not None)
        self._device = arenas[0].device
        self._launches = [_Launch(dtypes, rows, self._device) for dtypes, rows in pieces.items()]

    def write(self) -> list[int]:
        """Write all but the odd ones. Returns their digests; an odd one's is none."""
        return finished(self.launch().cpu().numpy(), self._nbytes)

    def launch(self) -> torch.Tensor:
        """Write all but the odd ones in the order of the current stream. Returns the sums of their digests, there."""
        totals = torch.zeros(len(self._nbytes), dtype=torch.int64, device=self._device)
        for launch in self._launches:
            launch(totals)
        return totals

    def copied(
        self, items: Sequence[Item], arenas: Sequence[Arena]
    ) -> Iterator[tuple[int, Placement, torch.Tensor]]:
        """Write the odd ones of `items`. Gives each one's index, its placement, and its value as it was written."""
        for i in self.odd:
            placement, tensor = items[i]
            for part, place in placement.pairs(arenas, tensor):
                place.copy_(part)
            yield i, placement, tensor.detach().to(getattr(torch, placement.spec.dtype))


_plans: OrderedDict[tuple[object, ...], _Plan] = OrderedDict()


def _plan_for(items: Sequence[Item], arenas: Sequence[Arena]) -> _Plan:
    """A trainer's parameters stay where they are: what says so is made once, for it takes longer than the writing."""
    placements, tensors = zip(*items, strict=True)
    # By functions of C's: in a loop of Python's this would take longer than the kernel.
    addresses, dtypes = map(torch.Tensor.data_ptr, tensors), map(_dtype_of, tensors)
    key = (*(arena.address for arena in arenas), *map(id, placements), *addresses, *dtypes)
    plan = _plans.pop(key, None) or _Plan(items, arenas)
    if len(items) > 1:  # one alone is fresh memory, as a merged adapter is
        _plans[key] = plan
        if len(_plans) > _KEPT:
            _plans.popitem(last=False)
    return plan


class _Launch:
    """The kernel of one pair of dtypes, with its table of pieces on the device."""

    def __init__(self, dtypes: Dtypes, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        counts = [-(-row[2] // _TILE) for row in rows]
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        self._blocks = sum(counts)
        self._pieces = kernels.table([[*row, first] for row, first in zip(rows, firsts, strict=True)], device)
        self._piece_of = kernels.owners(counts, device)
        source, target = (_NAMES[dtype] for dtype in dtypes)
        self._kernel = kernels.kernel("write", SOURCE=source, TARGET=target, TILE=f"{_TILE}ULL")

    def __call__(self, totals: torch.Tensor) -> None:
        kernels.launch(self._kernel, self._blocks, totals.device, self._pieces, self._piece_of, totals)


def _piece(block: Block, tensor: torch.Tensor, dtypes: Dtypes, arena: int, first: int) -> list[int] | None:
    """A row of the kernel's table, without tensor and first block; None where the kernel cannot take the block."""
    if not set(dtypes) <= _NAMES.keys():
        return None
    rows = _rows(block)
    source_size, size = (dtype.itemsize for dtype in dtypes)
    lanes = 16 // max(source_size, size)
    source = tensor.data_ptr() + (block.tensor_offset - first) * source_size
    target = arena + block.arena_offset
    if rows is None or source % (lanes * source_size) or target % (lanes * size):
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
