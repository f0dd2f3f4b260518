"""In which pieces a policy travels between memories of one layout: both sides find the same from its placements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from weight_transfer.arena import ALIGNMENT, align
from weight_transfer.manifest import ITEMSIZE
from weight_transfer.placement import Placement, contiguous_strides

WINDOW_BYTES = 256 << 20
"""As much as keeps a link busy, and little enough that the next window is filled, and the last digested, meanwhile."""
MIRROR_BYTES = 4 << 30
"""Of a window that nobody fills. Each costs a tenth of a millisecond, and is to be there within `nccl.STALL_S`."""


@dataclass(frozen=True)
class Run:
    """Bytes of an arena that are tensors' without a gap."""

    arena: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Window:
    """What travels at once: whole tensors, by their indices, and the runs in which they lie, in rising order."""

    tensors: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self.runs)


def windows(
    placements: Sequence[Placement], limit: int = WINDOW_BYTES, *, last: int = WINDOW_BYTES
) -> list[Window]:
    """Cut a policy, whose tensors are in the manifest's order, into windows of at most `limit` bytes or one tensor.

    Nothing but the tensors' own bytes is in any run: what lies between them is the engine's. Towards the end windows
    are smaller, three quarters of what is left but not less than `last`: little is left to digest once all is there.

    Raises:
        ValueError: a tensor is strewn over its arena; names it.
    """
    runs = [_runs(placement) for placement in placements]
    order = sorted(
        (i for i, found in enumerate(runs) if found), key=lambda i: (runs[i][0].arena, runs[i][0].offset)
    )
    found: list[Window] = []
    tensors: list[int] = []
    held, left = 0, sum(placements[i].spec.nbytes for i in order)
    room = min(limit, max(last, left * 3 // 4))
    for i in order:
        if tensors and held + placements[i].spec.nbytes > room:
            found.append(_window(tensors, runs))
            left -= held
            tensors, held, room = [], 0, min(limit, max(last, left * 3 // 4))
        tensors.append(i)
        held += placements[i].spec.nbytes
    if tensors:
        found.append(_window(tensors, runs))
    return found


def _runs(placement: Placement) -> list[Run]:
    itemsize = ITEMSIZE[placement.spec.dtype]
    found = []
    for block in placement.blocks:
        steps = [(n, s) for n, s in zip(block.shape, block.arena_strides, strict=True) if n != 1]
        dense = contiguous_strides([n for n, _ in steps])
        if block.numel and tuple(s for _, s in steps) != dense:
            raise ValueError(f"{placement.spec.name}: the engine holds it in another memory order")
        if block.numel:
            found.append(Run(block.arena, block.arena_offset, block.numel * itemsize))
    return sorted(found, key=lambda run: (run.arena, run.offset))


def _window(tensors: Sequence[int], runs: Sequence[Sequence[Run]]) -> Window:
    merged: list[Run] = []
    parts = sorted((run for i in tensors for run in runs[i]), key=lambda run: (run.arena, run.offset))
    for run in parts:
        last = merged[-1] if merged else None
        if last is not None and (last.arena, last.offset + last.nbytes) == (run.arena, run.offset):
            merged[-1] = Run(last.arena, last.offset, last.nbytes + run.nbytes)
        else:
            merged.append(run)
    return Window(tuple(tensors), tuple(merged))


def in_bucket(runs: Sequence[Run]) -> tuple[list[int], int]:
    """Where each run of a window begins in a bucket, aligned as it is in its arena; and where the last ends."""
    starts, end = [], 0
    for run in runs:
        starts.append(align(end) + run.offset % ALIGNMENT)
        end = starts[-1] + run.nbytes
    return starts, end


def moved(placement: Placement, runs: Sequence[Run], starts: Sequence[int]) -> Placement:
    """The placement of a window's tensor in a bucket, where the runs begin at `starts`: arena 0."""
    blocks = []
    for block in placement.blocks:
        if not block.numel:
            continue
        (at,) = (
            start + block.arena_offset - run.offset
            for run, start in zip(runs, starts, strict=True)
            if run.arena == block.arena and run.offset <= block.arena_offset < run.offset + run.nbytes
        )
        blocks.append(replace(block, arena=0, arena_offset=at))
    return replace(placement, blocks=tuple(blocks))
