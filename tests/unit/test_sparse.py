"""Elements that changed: what is found, and what arrives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer.sparse import Changes, Packed, bits, changed, pack, unpack

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool]
LIMIT = 1 << 20


def through(changes: Changes, numel: int, itemsize: int, max_bytes: int) -> Changes:
    """Packed, and unpacked again."""
    parts = [unpack(packed, numel, itemsize, max_bytes) for packed in pack(changes, max_bytes)]
    return Changes(
        changes.tensor, torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])
    )


@given(st.data())
def test_what_went_in_comes_out(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    numel = data.draw(st.integers(1, 300))
    chosen = sorted(data.draw(st.sets(st.integers(0, numel - 1), min_size=1)))
    seed, room = data.draw(st.integers(0, 99)), data.draw(st.integers(16, 200))
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (numel * size,), generator=generator, dtype=torch.uint8)
    values = bits(raw.view(dtype))
    indices = torch.tensor(chosen)
    found = through(Changes(7, indices, values[indices]), numel, size, room)
    assert found.tensor == 7
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.values, values[indices])


@pytest.mark.parametrize(
    ("gap", "width"), [(256, 1), (257, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (1 << 24, 4)]
)
def test_gaps_take_what_they_need(gap: int, width: int) -> None:
    indices = torch.tensor([3, 3 + gap, 4 + gap])
    values = torch.tensor([1, 2, 3], dtype=torch.int16)
    (packed,) = pack(Changes(0, indices, values), LIMIT)
    assert (packed.first, packed.count, packed.gap_bytes) == (3, 3, width)
    found = unpack(packed, gap + 5, 2, LIMIT)
    assert found.indices.tolist() == indices.tolist()
    assert torch.equal(found.values, values)
    with pytest.raises(ValueError, match=f"has {gap + 4} elements, not {gap + 5}"):
        unpack(packed, gap + 4, 2, LIMIT)


def test_pieces_stay_under_their_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(100_000, generator=generator) < 0.1).nonzero().view(-1)
    values = torch.randint(-(2**15), 2**15, indices.shape, generator=generator, dtype=torch.int16)
    pieces = list(pack(Changes(0, indices, values), 4096))
    assert len(pieces) > 3
    assert all(len(piece.data) <= 4096 for piece in pieces)
    assert sum(piece.count for piece in pieces) == len(indices)
    found = through(Changes(0, indices, values), 100_000, 2, 4096)
    assert torch.equal(found.indices, indices)


def test_bits_are_compared_and_not_values() -> None:
    before = torch.tensor([0.0, float("nan"), 1.0, float("nan")])
    now = before.clone()
    now[0] = -0.0
    bits(now)[3] ^= 1  # another NaN
    assert changed(bits(now), bits(before)).tolist() == [0, 3]
    assert not len(changed(bits(before), bits(before)))


@given(
    st.builds(
        Packed,
        st.just(0),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.booleans(),
        st.binary(max_size=64),
    )
)
def test_whatever_arrives_is_elements_of_the_tensor_or_an_error(packed: Packed) -> None:
    try:
        found = unpack(packed, 1000, 2, 4096)
    except ValueError:
        return
    indices = found.indices
    assert len(indices) == len(found.values) == packed.count
    assert 0 <= int(indices[0]) <= int(indices[-1]) < 1000
    assert bool((indices[1:] > indices[:-1]).all())
