"""The parts of a tensor that ranks hold: their digest sums, and how these make up the tensor's digest.

A tensor's digest is a sum over its words. So each rank adds up the words of its own blocks, where they lie, and whoever
has all the sums has the digest, without a byte of the tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from weight_transfer import _core
from weight_transfer.digest import WORD, finish
from weight_transfer.manifest import ITEMSIZE, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides, runs

if TYPE_CHECKING:
    import torch

Part = tuple[int, int, tuple[tuple[int, int], ...]]


class Rows(NamedTuple):
    """Bytes that follow one another in the tensor too, and the same again a `stride` further on; `csrc/digest.hpp`."""

    address: int
    nbytes: int
    rows: int
    stride: int
    first_word: int
    word_stride: int


def part_of(block: Block) -> Part:
    """Which elements of its tensor a block has, wherever they lie: equal for ranks that hold the same ones."""
    run, rest = runs(block)
    return block.tensor_offset, run, tuple(rest)


def why_not_summed(placement: Placement) -> str:
    """Why the sums of the blocks don't add up to the tensor's digest; "" if they do."""
    spec = placement.spec
    parts = {part_of(block): block for block in placement.blocks if block.numel}
    if sum(block.numel for block in parts.values()) != spec.numel:
        return "the ranks' parts of it overlap"
    if not all(_has_whole_words(spec, block) for block in parts.values()):
        return f"its parts begin or end within one of the {WORD}-byte words that digests are made of"
    return ""


def _has_whole_words(spec: TensorSpec, block: Block) -> bool:
    size, (run, rest) = ITEMSIZE[spec.dtype], runs(block)
    if any(n * size % WORD for n in (block.tensor_offset, *(step for step, _ in rest))):
        return False
    return not run * size % WORD or (not rest and block.tensor_offset + run == spec.numel)


def first_of_each(placement: Placement) -> list[bool]:
    """Of each block whether no block before it is the same part of the tensor: those are the tensor, once."""
    seen: set[Part] = set()
    found = []
    for block in placement.blocks:
        part = part_of(block)
        found.append(part not in seen)
        seen.add(part)
    return found


def made_up(placement: Placement, sums: Sequence[int]) -> int:
    """The digest of a tensor whose blocks, in their order, have these sums. Nothing may speak against it, as
    `why_not_summed` says.

    Raises:
        ValueError: ranks that hold the same part of it hold different values.
    """
    found: dict[Part, int] = {}
    for block, value in zip(placement.blocks, sums, strict=True):
        if block.numel and found.setdefault(part_of(block), value) != value:
            raise ValueError(f"the ranks hold different values of {placement.spec.name}")
    return finish(sum(found.values()), placement.spec.nbytes)


class PartSums:
    """The digest sum of each of some blocks, as often as it is wanted. Their words must be whole ones."""

    def __init__(self, parts: Iterable[tuple[Block, torch.Tensor]], *, threads: int = 0) -> None:
        """Of blocks and what they hold, of their shape and any strides, all on one device. It must keep its memory."""
        self._parts = list(parts)
        self._threads = threads
        self._loose: list[
            int
        ] = []  # what is in another order than in the tensor: copied, one after the other
        self._rows: list[Rows] = []
        self._owners: list[int] = []
        for i, (block, place) in enumerate(self._parts):
            if not block.numel:
                continue
            if (rows := _rows(block, place)) is None:
                self._loose.append(i)
            else:
                self._rows += rows
                self._owners += [i] * len(rows)
        self._adding = self._later(self._rows, self._owners, len(self._parts))

    def sums(self) -> list[int]:
        """As they are now. On a CUDA device this waits for torch's current stream."""
        return self.later()()

    def later(self) -> Callable[[], list[int]]:
        """Begin, in the order of torch's current stream where that is a device's; call the result for the sums."""
        begun = self._adding()

        def end() -> list[int]:
            found = begun()
            for i in self._loose:
                block, place = _compact(*self._parts[i])
                rows = _rows(block, place)
                assert rows is not None  # noqa: S101  for the type checker
                found[i] = self._later(rows, [0] * len(rows), 1)()()[0]
            return found

        return end

    def _later(
        self, rows: Sequence[Rows], owners: Sequence[int], count: int
    ) -> Callable[[], Callable[[], list[int]]]:
        """What begins to add up, for each of `count` owners, its rows."""
        device = self._parts[0][1].device if self._parts else None
        if device is not None and device.type == "cuda" and rows:
            from weight_transfer.cuda.digest import Sums

            adding = Sums(rows, owners, count, device)

            def begin() -> Callable[[], list[int]]:
                totals, there = adding.later()

                def read() -> list[int]:
                    there.synchronize()
                    return [total % 2**64 for total in totals.tolist()]

                return read

            return begin

        def add_up() -> list[int]:
            found = [0] * count
            for owner, value in zip(owners, _core.digest_rows(rows, self._threads), strict=True):
                found[owner] = (found[owner] + value) % 2**64
            return found

        def begin_here() -> Callable[[], list[int]]:
            found = add_up()
            return lambda: found

        return begin_here


def sum_of(placement: Placement, tensor: torch.Tensor) -> int:
    """The sum of those parts of `tensor` that a placement's blocks are. It has the spec's shape and dtype."""
    tensor = tensor.contiguous()
    return sum(PartSums(zip(placement.blocks, placement.parts(tensor), strict=True)).sums()) % 2**64


def _rows(block: Block, place: torch.Tensor) -> list[Rows] | None:
    """The rows of what a block holds; None where they would not be of whole words, as what lies in another order."""
    size, dims = place.element_size(), _steps(block, place.stride())
    run = dims.pop()[2] if dims and dims[-1][:2] == (1, 1) else 1
    if any(n * size % WORD for n in (run, *(step for step, _, _ in dims))) and (dims or run != block.numel):
        return None
    *far, (step, stride, rows) = dims or [(0, 0, 1)]
    last = Rows(0, run * size, rows, stride, 0, step)
    return list(_each(place.data_ptr(), block.tensor_offset, far, last, size))


def _each(address: int, first: int, far: list[tuple[int, int, int]], rows: Rows, size: int) -> Iterator[Rows]:
    for where in itertools.product(*(range(length) for _, _, length in far)):
        at = first + sum(i * step for i, (step, _, _) in zip(where, far, strict=True))
        begin = address + sum(i * stride for i, (_, stride, _) in zip(where, far, strict=True)) * size
        yield rows._replace(
            address=begin,
            stride=rows.stride * size,
            first_word=at * size // WORD,
            word_stride=rows.word_stride * size // WORD,
        )


def _steps(block: Block, strides: Sequence[int]) -> list[tuple[int, int, int]]:
    """(step in the tensor, step where it lies, length) along each dimension, the widest first; those that continue one
    another on both sides are one."""
    found: list[tuple[int, int, int]] = []
    for step, stride, length in sorted(
        zip(block.tensor_strides, strides, block.shape, strict=True), reverse=True
    ):
        if length == 1:
            continue
        if found and found[-1][:2] == (length * step, length * stride):
            found[-1] = (step, stride, found[-1][2] * length)
        else:
            found.append((step, stride, length))
    return found


def _compact(block: Block, place: torch.Tensor) -> tuple[Block, torch.Tensor]:
    """The same in fresh memory, in the tensor's order."""
    order = sorted(range(len(block.shape)), key=lambda dim: block.tensor_strides[dim], reverse=True)
    shape = tuple(block.shape[dim] for dim in order)
    steps = tuple(block.tensor_strides[dim] for dim in order)
    dense = Block(block.arena, 0, contiguous_strides(shape), block.tensor_offset, steps, shape)
    return dense, place.permute(order).contiguous()
