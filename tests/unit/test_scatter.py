"""scatter() against torch's own casts and copies."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_transfer import _core
from weight_transfer.scatter import scatter

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OTHERS = [torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn]
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if _core.limit_isa(request.param) != request.param:
        _core.limit_isa("auto")
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _core.limit_isa("auto")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTS[tensor.itemsize])


def from_bits(patterns: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(f"u{dtype.itemsize}")).view(dtype)


def expected(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tensor.to, with one bfloat16 NaN: torch's vectorised code gives 0xffff, its scalar code 0x7fc0."""
    result = source.to(dtype, copy=True)
    if dtype == torch.bfloat16 != source.dtype:
        result[result.isnan()] = from_bits(np.array([0x7FC0]), torch.bfloat16)[0]
    return result


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    different = (bits(got) != bits(want)).nonzero()
    assert len(different) == 0, f"{len(different)} differ, first at {different[0].tolist()}"


def hard_patterns(dtype: torch.dtype) -> np.ndarray:
    """Bit patterns of `dtype` around every rounding boundary of the narrower formats, and random ones."""
    rng = np.random.default_rng(0)
    width = dtype.itemsize * 8
    if width == 16:
        return np.arange(1 << 16, dtype=np.uint64)
    random = rng.integers(0, 1 << width, 50_000, dtype=np.uint64)
    # All float16 and bfloat16 values and the midpoints between neighbours, each with its two neighbours.
    edges = []
    for narrow in (torch.float16, torch.bfloat16):
        values = from_bits(np.arange(0x7C00 if narrow == torch.float16 else 0x7F80, dtype=np.uint64), narrow)
        exact = values.double()
        exact = torch.cat([exact, (exact[:-1] + exact[1:]) / 2]).to(dtype)
        edges.append(exact.view(INTS[dtype.itemsize]).numpy().view(f"u{dtype.itemsize}").astype(np.uint64))
    near = np.concatenate(
        [edge + np.uint64(step) for edge in edges for step in (0, 1)] + [edges[0] - np.uint64(1)]
    )
    near &= np.uint64((1 << width) - 1)
    return np.concatenate([random, near, near | np.uint64(1 << (width - 1))])


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
def test_casts_bit_for_bit_as_torch(of: torch.dtype, to: torch.dtype, isa: str) -> None:
    source = from_bits(hard_patterns(of), of)
    destination = torch.empty(source.shape, dtype=to)
    assert scatter([(source, destination)]) == destination.nbytes
    assert_same_bits(destination, expected(source, to))


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
def test_strided_casts_bit_for_bit_as_torch(of: torch.dtype, to: torch.dtype, isa: str) -> None:
    """The transposing and the strided loops are other code than the contiguous one."""
    source = from_bits(hard_patterns(of)[: 128 * 300], of).view(300, 128)
    for destination in (torch.empty(128, 300, dtype=to), torch.empty(128, 600, dtype=to)[:, ::2]):
        scatter([(source.t(), destination)])
        assert_same_bits(destination, expected(source.t(), to))


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_copies_every_dtype_as_bytes(dtype: torch.dtype) -> None:
    patterns = np.arange(24 * 8 * dtype.itemsize, dtype=np.uint8)
    source = torch.from_numpy(patterns % 2 if dtype == torch.bool else patterns).view(dtype).view(24, 8)
    destination = torch.zeros(8, 24, dtype=dtype)
    scatter([(source.t(), destination)])
    assert torch.equal(destination.view(torch.uint8), source.t().contiguous().view(torch.uint8))


@st.composite
def strided(draw: st.DrawFn, shape: list[int], dtype: torch.dtype, sign: int, repeats: bool) -> torch.Tensor:
    """A tensor of `shape` that lies somewhere in a larger one: permuted, stepped, offset, maybe expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    pads = [draw(st.integers(0, 2)) for _ in shape]
    lengths = [shape[i] * steps[i] + pads[i] for i in order]
    base = (torch.arange(math.prod(lengths)) % 997 * sign).to(dtype).view(lengths)
    view = base.permute([order.index(i) for i in range(len(shape))])
    for i, length in enumerate(shape):
        view = view.narrow(i, pads[i], length * steps[i])[(slice(None),) * i + (slice(None, None, steps[i]),)]
        if repeats and length and draw(st.integers(0, 9)) == 0:
            view = view.narrow(i, 0, 1).expand([length if j == i else -1 for j in range(len(shape))])
    return view


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 7), max_size=5))
def test_any_strides_and_nothing_beside_them(data: st.DataObject, shape: list[int]) -> None:
    of, to = data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(FLOATS))
    source = data.draw(strided(shape, of, 1, repeats=True))
    destination = data.draw(strided(shape, to, -1, repeats=False))
    whole = torch.empty(0, dtype=to).set_(destination.untyped_storage())
    want = whole.clone()
    want.as_strided(shape, destination.stride(), destination.storage_offset()).copy_(source)
    assert scatter([(source, destination)], threads=3) == destination.nbytes
    assert torch.equal(whole, want)


def test_large_blocks_over_many_threads() -> None:
    sources = [torch.randn(1031, 2053), torch.randn(700, 900, 3).permute(2, 0, 1), torch.randn(1 << 20)]
    pairs = [(source, torch.empty(source.shape, dtype=torch.bfloat16)) for source in sources]
    scatter(pairs, threads=7)
    for source, destination in pairs:
        assert torch.equal(destination, source.bfloat16())


def test_column_blocks_of_one_matrix_may_be_written_together() -> None:
    fused = torch.zeros(64, 96)
    parts = [torch.randn(64, 32) for _ in range(3)]
    scatter([(part, fused[:, 32 * i : 32 * i + 32]) for i, part in enumerate(parts)])
    assert torch.equal(fused, torch.cat(parts, dim=1))


def test_same_memory_is_nothing_to_do() -> None:
    tensor = torch.randn(4, 6)
    before = tensor.clone()
    assert scatter([(tensor, tensor), (tensor[:, ::2], tensor[:, ::2])]) == 0
    assert torch.equal(tensor, before)


def test_empty_and_scalar() -> None:
    scalar = torch.zeros((), dtype=torch.float16)
    assert scatter([]) == 0
    assert scatter([(torch.empty(3, 0), torch.empty(3, 0)), (torch.tensor(1.5), scalar)]) == 2
    assert scalar.item() == 1.5


def freed() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


BASE = torch.zeros(100)
REFUSED = {
    "shape": ((torch.zeros(3), torch.zeros(4)), r"pair 1: source shape \[3\] is not destination shape \[4\]"),
    "rank": ((torch.zeros(4), torch.zeros(4, 1)), "shape"),
    "cast": ((torch.zeros(4), torch.zeros(4, dtype=torch.int32)), "cannot cast torch.float32 to torch.int32"),
    "dtype": ((torch.zeros(4, dtype=torch.complex64),) * 2, "source of torch.complex64 cannot be copied"),
    "negative": ((torch.tensor([1j])._neg_view().imag, torch.zeros(1)), "source of torch.float32 cannot"),
    "device": ((torch.zeros(4, device="meta"), torch.zeros(4)), "source is torch.strided on meta"),
    "sparse": ((torch.zeros(4), torch.zeros(4).to_sparse()), "destination is torch.sparse_coo on cpu"),
    "freed": ((torch.zeros(4), freed()), "destination's storage was freed"),
    "shifted": ((BASE[:10], BASE[5:15]), "overlaps pair 1's"),
    "reversed": ((BASE.view(10, 10), BASE.view(10, 10).t()), "overlaps pair 1's"),
    "columns": ((BASE.view(10, 10)[:, :6], BASE.view(10, 10)[:, 4:]), "overlaps pair 1's"),
    "repeated": ((torch.zeros(4), torch.zeros(1).expand(4)), "destination may overlap itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_before_it_writes(name: str) -> None:
    pair, message = REFUSED[name]
    good = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        scatter([(torch.ones(4), good), pair])
    assert good.eq(0).all()


def test_refuses_overlap_across_pairs() -> None:
    twice, chained = torch.zeros(8), torch.zeros(8)
    with pytest.raises(ValueError, match="pair 1's destination overlaps pair 0's destination"):
        scatter([(torch.ones(8), twice), (torch.ones(4), twice[4:])])
    with pytest.raises(ValueError, match="pair 1's source overlaps pair 0's destination"):
        scatter([(torch.ones(8), chained), (chained[2:], torch.zeros(6))])
    assert twice.eq(0).all()
    assert chained.eq(0).all()


def job(**changes: object) -> tuple[object, ...]:
    block = {"src": 4096, "src_dtype": "float32", "src_strides": [1]}
    block |= {"dst": 8192, "dst_dtype": "float32", "dst_strides": [1], "shape": [4]}
    return tuple((block | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src": 0}, "job 0: source address is null"),
        ({"dst": 0}, "job 0: destination address is null"),
        ({"dst": 8193}, "not aligned to float32"),
        ({"shape": [-1]}, r"shape\[0\] is negative"),
        ({"src_strides": [-1]}, "source stride 0 is negative"),
        ({"dst_strides": [1, 1]}, "differ in length"),
        ({"shape": [2**40, 2**40], "src_strides": [0, 0], "dst_strides": [2**40, 1]}, "overflows"),
        ({"shape": [2**62]}, "byte count overflows"),
        ({"src_strides": [2**62]}, "source extent overflows"),
        ({"dst_strides": [2**61]}, "destination extent overflows"),
        ({"src": 2**64 - 8}, "source extent overflows"),
        ({"src_dtype": "float31"}, "unknown dtype 'float31'"),
        ({"src_dtype": "bool"}, "cannot cast bool to float32"),
    ],
)
def test_core_refuses_impossible_jobs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.scatter([job(**changes)])  # type: ignore[list-item]


def test_core_refuses_bad_threads_and_isa() -> None:
    with pytest.raises(ValueError, match="threads must not be negative"):
        _core.scatter([], -1)
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        _core.limit_isa("sse9")  # type: ignore[arg-type]
