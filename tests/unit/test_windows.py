"""Windows: every byte of the policy in one of them, none of the engine's own, and the same on both sides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.transports import SourceTensor
from weight_transfer.transports.outgoing import window_wanted
from weight_transfer.windows import MIRROR_BYTES, WINDOW_BYTES, Run, windows


def placed(name: str, shape: tuple[int, ...], *places: tuple[int, int]) -> Placement:
    """A bfloat16 tensor whose rows lie, in equal shares, at (arena, byte)."""
    share = (shape[0] // len(places), *shape[1:])
    strides = contiguous_strides(share)
    blocks = [
        Block(arena, offset, strides, i * share[0] * strides[0], strides, share)
        for i, (arena, offset) in enumerate(places)
    ]
    return Placement(TensorSpec(name, "bfloat16", shape), tuple(blocks))


def test_tensors_that_touch_travel_as_one_run() -> None:
    policy = [placed("k", (4, 8), (0, 64)), placed("q", (4, 8), (0, 0)), placed("v", (4, 8), (0, 256))]
    (window,) = windows(policy)
    assert window.tensors == (1, 0, 2)
    assert window.runs == (Run(0, 0, 128), Run(0, 256, 64))
    assert window.nbytes == 192


def test_a_window_has_whole_tensors_and_no_more_than_its_limit() -> None:
    policy = [placed(f"{i}", (8, 8), (0, 128 * i)) for i in range(5)]
    assert [w.tensors for w in windows(policy, 256)] == [(0, 1), (2, 3), (4,)]
    assert [w.tensors for w in windows(policy, 100)] == [(i,) for i in range(5)]


def test_towards_the_end_windows_are_smaller_so_that_little_is_left_to_digest() -> None:
    policy = [placed(f"{i:02}", (8, 8), (0, 128 * i)) for i in range(16)]
    cut = windows(policy, 1024, last=128)
    assert [w.nbytes for w in cut] == [1024, 768, 128, 128]
    assert [i for w in cut for i in w.tensors] == list(range(16))
    assert [w.nbytes for w in windows(policy, 1024)] == [1024, 1024], (
        "no window is cut below what is worth one"
    )


def test_a_trainer_asks_for_large_windows_where_none_of_them_is_a_bucket() -> None:
    def source(dtype: str, parameter: bool) -> SourceTensor:
        value = torch.zeros(4, 8, dtype=getattr(torch, dtype))
        of_model = torch.nn.Parameter(value) if parameter else None
        return SourceTensor(TensorSpec("w", dtype, (4, 8)), lambda: value, of_model)

    manifest = Manifest((TensorSpec("w", "bfloat16", (4, 8)),))
    assert window_wanted(manifest, [source("bfloat16", True)]) == MIRROR_BYTES
    assert window_wanted(manifest, [source("float32", True)]) == WINDOW_BYTES
    assert window_wanted(manifest, [source("bfloat16", False)]) == WINDOW_BYTES, "merged, or gathered"


def test_a_tensor_in_several_places_is_in_one_window() -> None:
    policy = [placed("a", (4, 8), (0, 512), (1, 0)), placed("b", (4, 8), (0, 0))]
    first, second = windows(policy, 64)
    assert (first.tensors, first.runs) == ((1,), (Run(0, 0, 64),))
    assert (second.tensors, second.runs) == ((0,), (Run(0, 512, 32), Run(1, 0, 32)))


def test_a_tensor_of_nothing_is_in_no_window() -> None:
    assert windows([placed("empty", (0, 8), (0, 0))]) == []


def test_a_tensor_that_is_strewn_over_its_arena_is_named() -> None:
    block = Block(0, 0, (16, 1), 0, (8, 1), (4, 8))
    with pytest.raises(ValueError, match="w: the engine holds it in another memory order"):
        windows([Placement(TensorSpec("w", "bfloat16", (4, 8)), (block,))])


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    limit=st.integers(1, 300),
    order=st.randoms(),
)
def test_each_byte_of_the_policy_is_in_one_run(
    sizes: list[int], gaps: list[int], limit: int, order: st.DataObject
) -> None:
    at, policy, mine = 0, [], set()
    for i, size in enumerate(sizes):
        policy.append(placed(f"{i:02}", (size,), (0, at)))
        mine |= set(range(at, at + 2 * size))
        at += 2 * (size + gaps[i])
    order.shuffle(policy)  # type: ignore[attr-defined]
    found = windows(policy, limit)
    travelled = [b for w in found for run in w.runs for b in range(run.offset, run.offset + run.nbytes)]
    assert sorted(travelled) == sorted(mine)
    assert sorted(i for w in found for i in w.tensors) == list(range(len(sizes)))
    assert all(w.nbytes <= limit or len(w.tensors) == 1 for w in found)
    assert travelled == sorted(travelled), "in rising order"
