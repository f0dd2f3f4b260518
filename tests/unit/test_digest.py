"""The digest against its definition in plain Python, and the properties that updates rely on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weight_transfer import _core
from weight_transfer.digest import (
    combine,
    digest_regions,
    digest_tensor,
    digest_tensors,
    finish,
    partial,
)

MASK = 2**64 - 1


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if _core.limit_isa(request.param) != request.param:
        _core.limit_isa("auto")
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _core.limit_isa("auto")


def mix(word: int, index: int) -> int:
    x = word ^ ((index + 1) * 0x9E3779B97F4A7C15 & MASK)
    x ^= x >> 27
    x = x * 0x3C79AC492BA7B653 & MASK
    x ^= x >> 33
    x = x * 0x1C69B3F74AC4AE35 & MASK
    return x ^ (x >> 27)


def oracle(data: bytes) -> int:
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return mix(sum(mix(word, index) for index, word in enumerate(words)) & MASK ^ len(data), 0)


def of_bytes(data: bytes) -> int:
    return digest_tensor(torch.tensor(list(data), dtype=torch.uint8))


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


# Frozen: a digest that changes breaks every pair of processes of different versions.
GOLDEN = {
    b"": 0xB70FB2CC55AF013F,
    b"\x00": 0x5D041EF0CD680329,
    b"tandem": 0xEE9F8060C31C7C0A,
    bytes(range(256)): 0x0B386E8990902C5C,
    bytes(8): 0x719C8816A1AEB165,
    bytes(16): 0x8EFAE504FFDF8109,
}


@pytest.mark.parametrize("data", GOLDEN, ids=repr)
def test_golden(data: bytes) -> None:
    assert of_bytes(data) == oracle(data) == GOLDEN[data]


def test_golden_combine() -> None:
    assert combine([]) == 0xB70FB2CC55AF013F
    assert combine([1, 2, MASK]) == 0x4652F65902517125


@given(data=st.binary(max_size=600))
def test_matches_the_definition(data: bytes) -> None:
    assert of_bytes(data) == oracle(data)


@given(digests=st.lists(st.integers(0, MASK), max_size=40))
def test_combine_is_the_digest_of_its_list(digests: list[int]) -> None:
    assert combine(digests) == oracle(b"".join(digest.to_bytes(8, "little") for digest in digests))


def test_every_instruction_set_agrees(isa: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, 5003, dtype=np.uint8)
    for start in (0, 1, 8):
        assert of_bytes(data[start:].tobytes()) == oracle(data[start:].tobytes())
        region = (address(data) + start, len(data) - start)
        assert digest_regions([region]) == [oracle(data[start:].tobytes())]


@given(data=st.binary(min_size=1, max_size=400), where=st.integers(0, 2**32), bit=st.integers(0, 7))
def test_a_flipped_bit_shows(data: bytes, where: int, bit: int) -> None:
    changed = bytearray(data)
    changed[where % len(data)] ^= 1 << bit
    assert of_bytes(bytes(changed)) != of_bytes(data)


@given(words=st.lists(st.binary(min_size=8, max_size=8), min_size=2, max_size=40), data=st.data())
def test_order_shows(words: list[bytes], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(words))
    assert (of_bytes(b"".join(shuffled)) == of_bytes(b"".join(words))) == (shuffled == words)


def test_trailing_zeros_show() -> None:
    digests = {of_bytes(bytes(length)) for length in range(40)}
    assert len(digests) == 40


def test_sign_flips_never_cancel() -> None:
    """Two flips in one tensor: with a weaker mix their changes to the sum cancel by the thousand."""
    count = 1 << 17
    rng = np.random.default_rng(2)
    weights = torch.from_numpy(rng.normal(0, 0.02, 4 * count).astype(np.float32)).bfloat16()
    words = weights.view(torch.int64).numpy().view(np.uint64)
    for bit in (15, 31, 47, 63):
        flipped = words ^ np.uint64(1 << bit)
        change = np.array(
            [
                (partial(address(flipped) + 8 * i, 8, i) - partial(address(words) + 8 * i, 8, i)) & MASK
                for i in range(0, count, 16)
            ],
            dtype=np.uint64,
        )
        assert len(np.unique(np.concatenate([change, -change]))) == 2 * len(change)


@given(
    data=st.binary(min_size=1, max_size=800),
    cuts=st.lists(st.integers(0, 100), max_size=5),
    threads=st.integers(0, 3),
)
def test_parts_add_up_in_any_order(data: bytes, cuts: list[int], threads: int) -> None:
    array = np.frombuffer(data, dtype=np.uint8)
    words = -(-len(data) // 8)
    edges = sorted({0, words, *(cut for cut in cuts if cut < words)})
    total = 0
    for first, last in reversed(list(itertools.pairwise(edges))):
        nbytes = min(last * 8, len(data)) - first * 8
        total += partial(address(array) + first * 8, nbytes, first, threads=threads)
    assert finish(total, len(data)) == oracle(data)


def test_threads_and_chunks_do_not_show() -> None:
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in (5, 3_000_001, 0, 1 << 20)]
    want = [digest_tensors([tensor], threads=1)[0] for tensor in tensors]
    assert digest_tensors(tensors, threads=5) == want
    whole = tensors[1]
    half = 8 * 131_072 + 8
    parts = partial(whole.data_ptr(), half) + partial(whole.data_ptr() + half, whole.nbytes - half, half // 8)
    assert finish(parts, whole.nbytes) == want[1]


def test_strided_tensors_digest_as_their_contiguous_copy() -> None:
    matrix = torch.randn(33, 17)
    assert digest_tensor(matrix.t()) == digest_tensor(matrix.t().contiguous()) != digest_tensor(matrix)
    assert digest_tensor(torch.nn.Parameter(matrix)) == digest_tensor(matrix)


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="tensors are on cpu, meta: not all in one place"):
        digest_tensors([torch.zeros(1), torch.zeros(1, device="meta")])
    with pytest.raises(ValueError, match="region 0: null address"):
        partial(0, 8)
    with pytest.raises(ValueError, match=r"region 1: address \+ nbytes overflows"):
        digest_regions([(0, 0), (2**64 - 8, 16)])
    with pytest.raises(ValueError, match="threads must not be negative"):
        digest_regions([], threads=-1)
