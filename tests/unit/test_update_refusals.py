"""What of an update is refused before anything changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tests.update_plane import C, Plane, digest_of, random_bits, reason
from weight_transfer.sparse import Packed

pytestmark = pytest.mark.usefixtures("quiet")


def wrong(change: Callable[[Packed], Packed]) -> Any:
    return lambda plane: change(next(plane.packed(random_bits(2))))


REFUSED: dict[str, tuple[Any, str]] = {
    "no such tensor": (wrong(lambda p: dataclasses.replace(p, tensor=99)), "has 5 tensors, not 100"),
    "no elements": (wrong(lambda p: dataclasses.replace(p, count=0)), "no elements"),
    "gaps of three bytes": (wrong(lambda p: dataclasses.replace(p, gap_bytes=3)), "not 3"),
    "beyond the tensor": (wrong(lambda p: dataclasses.replace(p, first=p.first + 12)), "has 12 elements"),
    "far beyond": (wrong(lambda p: dataclasses.replace(p, first=2**64 - 1)), "has 12 elements"),
    "too few bytes": (
        wrong(lambda p: dataclasses.replace(p, compressed=False, data=p.data[:-1])),
        "it has",
    ),
    "more than is allowed": (wrong(lambda p: dataclasses.replace(p, count=1 << 30)), "the limit is"),
    "not zstd": (wrong(lambda p: dataclasses.replace(p, compressed=True, data=b"nonsense")), "not zstd's"),
}


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
async def test_elements_that_are_none(name: str, make: Any, said: str) -> None:
    plane = Plane()
    update = await plane.begin(name)
    with pytest.raises(InvalidArgument, match=said):
        update.changes(make(plane))
    assert plane.digest == digest_of(plane.values)
    assert await reason(update.abort(untouched=True, reason="")) == ""
    plane.check(C, 1, plane.values)


def test_a_frame_that_lies_about_its_size_costs_no_memory() -> None:
    import zstandard

    from weight_transfer.sparse import unpack

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(ValueError, match="does not unpack to 2 bytes"):
        unpack(Packed(0, 0, 1, 1, True, bomb), 10, 2, 1 << 20)


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
async def test_elements_and_whole_tensors_do_not_mix_in_one_tensor(name: str) -> None:
    plane, new = Plane(), random_bits(2)
    first, *_ = plane.packed(new)
    update = await plane.begin(name)
    update.changes(first)
    with pytest.raises(FailedPrecondition, match="it comes whole, and in elements too"):
        update.chunk(0, 0, b"1234")
    with pytest.raises(FailedPrecondition, match="comes after"):
        update.changes(first)
    await update.lose("out of order")
    plane = Plane()
    update = await plane.begin(name)
    update.chunk(0, 0, b"1234")
    with pytest.raises(FailedPrecondition, match="it comes whole, and in elements too"):
        update.changes(first)
    assert await reason(update.commit(1)) == Reason.UPDATE_ORDER, "and not half of it"


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
async def test_a_partial_update_may_carry_whole_tensors(name: str) -> None:
    plane, new = Plane(), random_bits(2)
    new[2], new[4] = plane.values[2], plane.values[4]  # these do not come at all
    update = await plane.begin(name)
    for i in (0, 1):
        raw = new[i].reshape(-1).view(torch.uint8).numpy().tobytes()
        update.chunk(i, 0, raw[:8])
        update.chunk(i, 8, raw[8:])
    assert await update.commit(digest_of(new)) == 2
    plane.check(C, 2, new)


@pytest.mark.parametrize("name", ["stream staged", "stream in place", "shared staged"])
async def test_elements_belong_to_partial_updates(name: str) -> None:
    plane = Plane()
    update = await plane.begin(name)
    with pytest.raises(FailedPrecondition, match="belong to partial updates"):
        update.changes(next(plane.packed(random_bits(2))))
    await update.abort(untouched=True, reason="")
