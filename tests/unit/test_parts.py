"""Ranks that each have a part of a tensor: what they add up is the digest of the whole, to the bit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.host_kernels import compiled, host_launch
from weight_transfer import parts as parts_module
from weight_transfer.arena import Arena
from weight_transfer.cuda import digest as cuda_digest
from weight_transfer.cuda import kernels
from weight_transfer.cuda import write as cuda_write
from weight_transfer.digest import digest_tensor, finish
from weight_transfer.manifest import TensorSpec
from weight_transfer.parts import PartSums, first_of_each, made_up, sum_of, why_not_summed
from weight_transfer.placement import Block, Placement, check, contiguous_strides
from weight_transfer.reading import Reading, part_sums
from weight_transfer.write import write_parts

DTYPES = {"bfloat16": 2, "float32": 4, "float64": 8, "int8": 1}


def placed(
    spec: TensorSpec, axis: int, edges: list[int], pads: list[int], *, turned: bool = False
) -> tuple[Placement, list[Arena]]:
    """A tensor cut along `axis`, each piece in an arena of its own, in rows that are wider by its pad."""
    strides = contiguous_strides(spec.shape)
    blocks, arenas = [], []
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        shape = tuple(end - start if dim == axis else n for dim, n in enumerate(spec.shape))
        wide = (*shape[:-1], shape[-1] + pads[rank % len(pads)])
        lies = contiguous_strides(wide)
        if turned:
            lies = tuple(reversed(contiguous_strides(tuple(reversed(wide)))))
        blocks.append(Block(rank, DTYPES[spec.dtype], lies, start * strides[axis], strides, shape))
        arenas.append(Arena.create("part", DTYPES[spec.dtype] * (math.prod(wide) + 2)))
    return Placement(spec, tuple(blocks)), arenas


def filled(placement: Placement, arenas: list[Arena]) -> torch.Tensor:
    spec = placement.spec
    raw = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, spec.dtype)).reshape(spec.shape)
    for source, place in placement.pairs(arenas, tensor):
        place.copy_(source)
    return tensor


@st.composite
def cuts(draw: st.DrawFn) -> tuple[TensorSpec, int, list[int], list[int], bool]:
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    shape = (*shape[:-1], shape[-1] * draw(st.sampled_from([1, 2, 4, 8, 16])))
    axis = draw(st.integers(0, len(shape) - 1))
    inner = draw(st.lists(st.integers(1, max(shape[axis] - 1, 1)), max_size=3))
    edges = sorted({0, shape[axis], *(edge for edge in inner if edge < shape[axis])})
    pads = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    return TensorSpec("t", dtype, shape), axis, edges, pads, draw(st.booleans())


@given(cut=cuts())
def test_the_sums_of_any_split_make_the_digest_of_the_whole(
    cut: tuple[TensorSpec, int, list[int], list[int], bool],
) -> None:
    spec, axis, edges, pads, turned = cut
    placement, arenas = placed(spec, axis, edges, pads, turned=turned)
    check([placement], [arena.size for arena in arenas])
    tensor = filled(placement, arenas)
    size, row = DTYPES[spec.dtype], contiguous_strides(spec.shape)[axis]
    whole_words = all(edge * row * size % 8 == 0 for edge in edges[1:-1]) and (
        axis == 0 or math.prod(spec.shape[axis:]) * size % 8 == 0 or len(edges) == 2
    )
    if axis and math.prod(spec.shape[:axis]) == 1:
        whole_words = all(edge * row * size % 8 == 0 for edge in edges[1:-1])
    assert (why_not_summed(placement) == "") == whole_words
    assert Reading([placement], arenas).digests() == [digest_tensor(tensor)], "added up, or gathered"
    if whole_words:
        sums = part_sums([placement], arenas).sums()
        assert made_up(placement, sums) == digest_tensor(tensor)
        # Of what is to be written, before it is anywhere.
        each = [sum_of(Placement(spec, (block,)), tensor) for block in placement.blocks]
        assert each == sums
        assert sum_of(placement, tensor) == sum(sums) % 2**64
        assert finish(sum(sums), spec.nbytes) == digest_tensor(tensor)


def replicated() -> tuple[Placement, list[Arena]]:
    """Rows 0 to 4 on ranks 0 and 1, the others on 2 and 3."""
    spec = TensorSpec("t", "float32", (8, 4))
    blocks = tuple(Block(rank, 0, (4, 1), rank // 2 * 16, (4, 1), (4, 4)) for rank in range(4))
    return Placement(spec, blocks), [Arena.create("part", 64) for _ in blocks]


def test_what_several_ranks_hold_counts_once_and_must_be_equal() -> None:
    placement, arenas = replicated()
    tensor = filled(placement, arenas)
    assert first_of_each(placement) == [True, False, True, False]
    assert why_not_summed(placement) == ""
    assert made_up(placement, part_sums([placement], arenas).sums()) == digest_tensor(tensor)
    arenas[3].tensor(60, (1,), torch.int32).add_(1)
    with pytest.raises(ValueError, match="the ranks hold different values of t"):
        made_up(placement, part_sums([placement], arenas).sums())
    with pytest.raises(ValueError, match="the ranks hold different values of t"):
        Reading([placement], arenas).digests()


def test_parts_that_overlap_or_break_words_say_so() -> None:
    spec = TensorSpec("t", "bfloat16", (6, 4))
    rows = [Block(0, 0, (4, 1), 0, (4, 1), (4, 4)), Block(1, 0, (4, 1), 8, (4, 1), (4, 4))]
    assert why_not_summed(Placement(spec, tuple(rows))) == "the ranks' parts of it overlap"
    columns = [Block(i, 0, (2, 1), 2 * i, (4, 1), (6, 2)) for i in range(2)]
    assert "within one of the 8-byte words" in why_not_summed(Placement(spec, tuple(columns)))
    end = TensorSpec("t", "bfloat16", (7,))
    assert (
        why_not_summed(Placement(end, (Block(0, 0, (1,), 0, (1,), (4,)), Block(1, 0, (1,), 4, (1,), (3,)))))
        == ""
    )
    assert (
        why_not_summed(Placement(end, (Block(0, 0, (1,), 0, (1,), (3,)), Block(1, 0, (1,), 3, (1,), (4,)))))
        != ""
    )


@given(cut=cuts())
def test_sums_follow_what_is_written(cut: tuple[TensorSpec, int, list[int], list[int], bool]) -> None:
    """What says where the parts lie is made once, and looked at anew."""
    spec, axis, edges, pads, turned = cut
    placement, arenas = placed(spec, axis, edges, pads, turned=turned)
    if why_not_summed(placement):
        return
    sums = part_sums([placement], arenas)
    for _ in range(2):
        tensor = filled(placement, arenas)
        assert made_up(placement, sums.sums()) == digest_tensor(tensor)


LAYOUTS: dict[str, tuple[tuple[int, ...], int, list[int], list[int]]] = {
    "columns": ((600, 256), 1, [0, 128, 256], [0]),
    "columns, rows a word wider": ((600, 256), 1, [0, 128, 256], [4]),
    "columns, rows anywhere": ((600, 256), 1, [0, 128, 256], [1, 3]),
    "columns of a word": ((5000, 8), 1, [0, 4, 8], [0]),
    "rows": ((600, 256), 0, [0, 200, 600], [0]),
    "rows, wider": ((600, 256), 0, [0, 200, 600], [8]),
    "of three dimensions": ((5, 64, 32), 1, [0, 16, 64], [8]),
    "an end": ((1027,), 0, [0, 512, 1027], [0]),
}


@pytest.mark.parametrize("offset", [0, 2])
def test_the_devices_sums_are_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """The kernel's source, compiled here, over all of these at once: a part begins at a unit of 16 bytes, or not."""
    library = compiled(tmp_path, "digest", CHUNK="(1ULL<<17)")
    monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", host_launch(library))
    rows, owners, wanted = [], [], []
    kept = []
    for shape, axis, edges, pads in LAYOUTS.values():
        spec = TensorSpec("t", "bfloat16", shape)
        placement, arenas = placed(spec, axis, edges, pads)
        blocks = [Block(b.arena, offset, *list(vars(b).values())[2:]) for b in placement.blocks]
        placement = Placement(spec, tuple(blocks))
        arenas = [Arena.create("part", arena.size + 64) for arena in arenas]
        filled(placement, arenas)
        for block, place in zip(placement.blocks, placement.places(arenas), strict=True):
            mine = parts_module._rows(block, place)
            assert mine is not None
            rows += mine
            owners += [len(wanted)] * len(mine)
            wanted += PartSums([(block, place)]).sums()
        kept.append(arenas)
    found = cuda_digest.Sums(rows, owners, len(wanted), torch.device("cpu"))()
    assert [total % 2**64 for total in found.tolist()] == wanted
    assert len(set(wanted)) == len(wanted)


def of_rank(placement: Placement, rank: int, first: int = 0) -> Placement:
    """A rank's blocks, to be written from its shard, which begins at `first`."""
    blocks = (replace(block, arena=0) for block in placement.blocks if block.arena == rank)
    return Placement(placement.spec, tuple(blocks), first)


def test_the_device_writes_and_counts_a_ranks_part_as_the_host_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns, what the kernel cannot take, and rows out of a shard of them: `first` is where that begins."""
    library = compiled(tmp_path, "write", SOURCE="float", TARGET="bf16", TILE="(1ULL<<15)")
    monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", host_launch(library))
    for shape, axis, edges, pads in [
        ((64, 48), 0, [0, 32, 64], [0]),
        ((64, 48), 1, [0, 16, 48], [8]),
        ((6, 20), 1, [0, 8, 20], [0]),
        ((64, 48), 0, [0, 40, 64], [1]),
    ]:
        spec = TensorSpec("t", "bfloat16", shape)
        placement, sizes = placed(spec, axis, edges, pads)
        whole = torch.randn(shape)
        total = 0
        for rank in range(2):
            mine, theirs = (Arena.create("part", sizes[rank].size + 256) for _ in range(2))
            firsts = [0] if axis else [0, edges[rank] * shape[1]]
            for first in firsts:
                part, shard = of_rank(placement, rank, first), whole.view(-1)[first:].clone()
                if not first:
                    shard = shard.view(shape)
                found = cuda_write.write_parts([(part, shard)], [mine])
                assert found == write_parts([(part, shard)], [theirs])
                assert torch.equal(*(a.tensor(0, (a.size,), torch.uint8) for a in (mine, theirs)))
            total += found[0]
        assert finish(total, spec.nbytes) == digest_tensor(whole.bfloat16())
