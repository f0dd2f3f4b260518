"""Placements: what is refused of those that another process sent, and what those that are taken do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer.arena import Arena
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, check, contiguous_strides, merged
from weight_transfer.scatter import scatter

SIZES = [64, 96]  # bytes of the arenas
SPEC = TensorSpec("t", "bfloat16", (4, 3))
WHOLE = Block(0, 8, (3, 1), 0, (3, 1), (4, 3))


def split(*edges: int, arena: int = 0) -> tuple[Block, ...]:
    """SPEC in blocks of rows, from edge to edge."""
    pairs = itertools.pairwise([0, *edges, 4])
    return tuple(Block(arena, 6 * a, (3, 1), 3 * a, (3, 1), (b - a, 3)) for a, b in pairs)


def columns(arena: int, first: int, count: int) -> Block:
    """Columns of SPEC, dense in an arena of their own: what a rank of a row-parallel layer has."""
    return Block(arena, 0, (count, 1), first, (3, 1), (4, count))


GOOD = {
    "one piece": (WHOLE,),
    "rows": split(1, 2),
    "transposed": (Block(0, 0, (1, 4), 0, (3, 1), (4, 3)),),
    "columns over ranks": (columns(0, 0, 2), columns(1, 2, 1)),
    "the same on each rank": (WHOLE, dataclasses.replace(WHOLE, arena=1)),
    "flat": (Block(0, 0, (1,), 0, (1,), (12,)),),
    "up to the end": (dataclasses.replace(WHOLE, arena_offset=64 - 24),),
    "odd lengths of one": (Block(0, 0, (3, 99, 1), 0, (3, 0, 1), (4, 1, 3)),),
    "with an empty block": (WHOLE, Block(1, 96, (3, 1), 12, (3, 1), (0, 3))),
}


@pytest.mark.parametrize("blocks", GOOD.values(), ids=GOOD)
def test_placements_that_are_right(blocks: tuple[Block, ...]) -> None:
    check([Placement(SPEC, blocks)], SIZES)
    arenas = [Arena.create("test", size) for size in SIZES]
    value = torch.randn(4, 3).bfloat16()
    placement = Placement(SPEC, blocks)
    scatter(placement.pairs(arenas, value))
    assert torch.equal(placement.gather(arenas), value)


def changed(**fields: object) -> tuple[Block, ...]:
    return (dataclasses.replace(WHOLE, **fields),)  # type: ignore[arg-type]


BAD = {
    "nothing": ((), "don't make up"),
    "a row is missing": (split(1, 2)[:2], "don't make up"),
    "a row twice, another never": ((*split(1, 2)[:2], split(1, 2)[1], split(1, 2, 3)[3]), "don't make up"),
    "no such arena": (changed(arena=2), "no arena 2"),
    "an arena before the first": (changed(arena=-1), "no arena -1"),
    "past the end": (changed(arena_offset=64 - 22), "bytes 42 to 66 leave the arena"),
    "before the start": (changed(arena_offset=-2), "leave the arena"),
    "far past the end": (changed(arena_offset=2**63 - 2), "leave the arena"),
    "beyond all bits": (changed(arena_offset=2**63), "beyond any memory"),
    "a length of one with a stride beyond all bits": (
        changed(shape=(4, 1, 3), arena_strides=(3, 2**63, 1), tensor_strides=(3, 0, 1)),
        "beyond any memory",
    ),
    "strides past the end": (changed(arena_strides=(2**62, 1)), "leave the arena"),
    "between two elements": (changed(arena_offset=7), "byte 7 is no place for a bfloat16"),
    "elements past the end": (changed(tensor_offset=1), "elements 1 to 13 leave the tensor"),
    "elements before the start": (changed(tensor_offset=-1), "elements -1 to 11 leave the tensor"),
    "tensor strides past the end": (changed(tensor_strides=(4, 1)), "leave the tensor"),
    "backwards": (changed(arena_strides=(3, -1)), "negative stride"),
    "backwards in the tensor": (changed(tensor_strides=(-3, 1)), "negative stride"),
    "all in one place": (changed(arena_strides=(0, 0)), "two elements in one place"),
    "rows in one place": (changed(arena_strides=(0, 1)), "two elements in one place"),
    "rows that overlap": (changed(arena_strides=(2, 1)), "two elements in one place"),
    "one element for all": (changed(tensor_strides=(0, 0)), "two elements in one place"),
    "too few strides": (changed(arena_strides=(1,)), "differ in length"),
    "too many strides": (changed(tensor_strides=(3, 1, 1)), "differ in length"),
    "a negative length": (changed(shape=(-4, -3)), "negative shape"),
    "two negative lengths and a large one": (changed(shape=(-4, -3), arena_offset=0), "negative shape"),
    "empty, and past the end": ((WHOLE, Block(0, 66, (1,), 0, (1,), (0,))), "leave the arena"),
}


@pytest.mark.parametrize(("blocks", "text"), BAD.values(), ids=BAD)
def test_placements_that_are_wrong(blocks: tuple[Block, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        check([Placement(TensorSpec("fine", "int8", (0,)), ()), Placement(SPEC, blocks)], SIZES)
    assert str(caught.value).startswith("t: "), "the tensor is named"


def test_tensors_that_are_none() -> None:
    for spec in (TensorSpec("t", "bfloat17", (4, 3)), TensorSpec("t", "", ())):
        with pytest.raises(ValueError, match="unknown dtype"):
            check([Placement(spec, (WHOLE,))], SIZES)
    with pytest.raises(ValueError, match="negative shape"):
        check([Placement(TensorSpec("t", "bfloat16", (-4, -3)), (WHOLE,))], SIZES)


INTS = st.integers(-2, 14) | st.sampled_from([31, 32, 33, 47, 48, 2**31, 2**63, 2**64])


@st.composite
def mostly_good(draw: st.DrawFn) -> list[Block]:
    """Good blocks of which some have one number changed, and now and then a wild one."""
    found = list(draw(st.sampled_from(list(GOOD.values()))))
    for _ in range(draw(st.integers(0, 2))):
        i = draw(st.integers(0, len(found) - 1))
        field = draw(st.sampled_from([f.name for f in dataclasses.fields(Block)]))
        value = getattr(found[i], field)
        if isinstance(value, tuple):
            at = draw(st.integers(0, max(len(value) - 1, 0)))
            value = (*value[:at], draw(INTS), *value[at + 1 :])
        else:
            value = draw(INTS)
        found[i] = dataclasses.replace(found[i], **{field: value})
    if draw(st.integers(0, 3)) == 0:
        rank = draw(st.integers(0, 3))
        several = st.lists(INTS, min_size=rank, max_size=rank).map(tuple)
        shape = st.lists(st.integers(0, 4), min_size=rank, max_size=rank).map(tuple)
        found.append(Block(draw(INTS), draw(INTS), draw(several), draw(INTS), draw(several), draw(shape)))
    return found


def places(block: Block, offset: int, strides: tuple[int, ...]) -> list[int]:
    """Where each element is, in elements, one by one."""
    if 0 in block.shape:  # whose other lengths may be beyond any memory
        return []
    return [
        offset + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, block.shape))
    ]


@given(mostly_good())
@settings(max_examples=300)
def test_whatever_is_accepted_is_safe_and_whole(given_blocks: list[Block]) -> None:
    placement = Placement(SPEC, tuple(given_blocks))
    try:
        check([placement], SIZES)
    except ValueError:
        return
    arenas = [Arena.create("test", size) for size in SIZES]
    taken: Counter[int] = Counter()
    written: Counter[tuple[int, int]] = Counter()
    for block in given_blocks:
        assert block.arena_offset % 2 == 0
        elements = places(block, block.tensor_offset, block.tensor_strides)
        memory = places(block, block.arena_offset // 2, block.arena_strides)
        assert all(0 <= e < SPEC.numel for e in elements)
        assert all(0 <= m < SIZES[block.arena] // 2 for m in memory)
        assert len(set(memory)) == len(memory)
        taken.update(set(elements))
        written.update((block.arena, m) for m in memory)
    assert set(taken) == set(range(SPEC.numel))
    value = torch.randn(SPEC.shape).bfloat16()
    for source, place in placement.pairs(arenas, value):
        place.copy_(source)
    if max(written.values()) == 1:
        assert torch.equal(placement.gather(arenas), value)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_whatever_is_cut_up_properly_is_accepted(rows: int, cols: int, data: st.DataObject) -> None:
    spec = TensorSpec("t", "int8", (rows, cols))
    row_cut, col_cut = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    parts = [
        Block(0, r0 * cols + c0, (cols, 1), r0 * cols + c0, (cols, 1), (r1 - r0, c1 - c0))
        for r0, r1 in ((0, row_cut), (row_cut, rows))
        for c0, c1 in ((0, col_cut), (col_cut, cols))
    ]
    parts = data.draw(st.permutations([part for part in parts if part.numel]))
    check([Placement(spec, tuple(parts))], [rows * cols])
    if len(parts) > 1:
        with pytest.raises(ValueError, match="make up"):
            check([Placement(spec, tuple(parts[1:]))], [rows * cols])


def test_a_large_tensor_is_checked_at_once() -> None:
    """In time and memory of its blocks, not of its elements."""
    side = 2**17
    spec = TensorSpec("t", "int8", (side, side))  # 16 GiB
    half = side // 2
    ranks = tuple(Block(r, 0, (half, 1), r * half, (side, 1), (side, half)) for r in range(2))
    check([Placement(spec, ranks)], [side * half] * 2)
    with pytest.raises(ValueError, match="make up"):
        check([Placement(spec, (ranks[0], dataclasses.replace(ranks[0], arena=1)))], [side * half] * 2)


ALIAS = {
    "one piece": ((WHOLE,), "bfloat16", ""),
    "flat": (GOOD["flat"], "bfloat16", ""),
    "dtype": ((WHOLE,), "float32", "the trainer's dtype is float32, the engine's bfloat16"),
    "rows": (GOOD["rows"], "bfloat16", "it lies in 3 blocks"),
    "ranks": (GOOD["the same on each rank"], "bfloat16", "it lies in 2 blocks"),
    "transposed": (GOOD["transposed"], "bfloat16", "the engine holds it in another memory order"),
    "gaps": (changed(arena_strides=(4, 1)), "bfloat16", "the engine holds it in another memory order"),
    "part": (split(2)[:1], "bfloat16", "the engine holds a part of it"),
}


@pytest.mark.parametrize(("given_blocks", "dtype", "reason"), ALIAS.values(), ids=ALIAS)
def test_what_may_be_aliased(given_blocks: tuple[Block, ...], dtype: str, reason: str) -> None:
    assert Placement(SPEC, given_blocks).alias_reason(dtype) == reason


def test_a_view_is_the_engines_memory() -> None:
    arena = Arena.create("test", 64)
    view = Placement(SPEC, (WHOLE,)).view([arena])
    assert view.data_ptr() == arena.address + 8
    assert (view.shape, view.dtype, view.is_contiguous()) == ((4, 3), torch.bfloat16, True)
    view.fill_(1.0)
    assert arena.tensor(8, (12,), torch.bfloat16).eq(1).all()
    assert arena.tensor(0, (4,), torch.bfloat16).eq(0).all()
    assert arena.tensor(32, (16,), torch.bfloat16).eq(0).all()


@pytest.mark.parametrize("name", ["rows", "transposed", "columns over ranks", "one piece"])
def test_a_source_that_is_part_of_a_larger_storage(name: str) -> None:
    """Offsets count from the tensor's start, not from its storage's."""
    arenas = [Arena.create("test", size) for size in SIZES]
    flat = torch.randn(40).bfloat16()
    value = flat[20:32].view(4, 3)
    placement = Placement(SPEC, GOOD[name])
    scatter(placement.pairs(arenas, value))
    assert torch.equal(placement.gather(arenas), value)


def test_a_source_in_another_memory_order() -> None:
    arenas = [Arena.create("test", size) for size in SIZES]
    value = torch.randn(3, 4).bfloat16().t()
    placement = Placement(SPEC, GOOD["rows"])
    scatter(placement.pairs(arenas, value))
    assert torch.equal(placement.gather(arenas), value)


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple))
def test_contiguous_strides_are_numpys(shape: tuple[int, ...]) -> None:
    if 0 in shape:  # numpy has its own idea of those
        assert len(contiguous_strides(shape)) == len(shape)
        return
    assert contiguous_strides(shape) == tuple(s // 8 for s in np.empty(shape).strides)
    assert math.prod(shape) == np.empty(shape).size


def test_shards_that_lie_as_they_did_are_one_block() -> None:
    """As of a checkpoint's fused q, k and v, which are copied one after the other."""
    rows = [(0, 8), (8, 2), (10, 2)]
    shards = [Block(0, 512 + first * 6, (3, 1), first * 3, (3, 1), (n, 3)) for first, n in rows]
    whole = Block(0, 512, (3, 1), 0, (3, 1), (12, 3))
    assert merged(shards[::-1], 2) == (whole,)
    swapped = [shards[0], dataclasses.replace(shards[1], arena_offset=shards[2].arena_offset)]
    assert merged(swapped, 2) == tuple(swapped)
    apart = [shards[0], dataclasses.replace(shards[1], arena=1)]
    assert merged(apart, 2) == tuple(apart)
    columns = [Block(0, 0, (6, 1), 0, (6, 1), (4, 3)), Block(0, 6, (6, 1), 3, (6, 1), (4, 3))]
    assert merged(columns, 2) == tuple(columns)
    assert merged([], 2) == ()
