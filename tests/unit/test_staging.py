"""Where a streamed update's bytes wait."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_service import staging as staging_module
from inference_service.arenas import HostArenas
from inference_service.staging import MappedStaging, Staging, unstage
from tandem.errors import DataLoss, FailedPrecondition, InvalidArgument, Reason
from weight_transfer.arena import Arena, align
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides

SPECS = (
    TensorSpec("a", "bfloat16", (3, 5)),
    TensorSpec("b", "int8", (7,)),
    TensorSpec("empty", "float32", (0, 4)),
    TensorSpec("scalar", "float64", ()),
    TensorSpec("flags", "bool", (3,)),
)
MANIFEST = Manifest(SPECS)
CHUNK = 8


def values() -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [
        torch.randint(0, 2, spec.shape) if spec.dtype == "bool" else torch.randn(spec.shape) * 9
        for spec in SPECS
    ]
    return [value.to(getattr(torch, spec.dtype)) for value, spec in zip(made, SPECS, strict=True)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def chunks(tensors: list[torch.Tensor], size: int = CHUNK) -> list[list[tuple[int, int, bytes]]]:
    """(tensor, offset, data) of each tensor's chunks."""
    return [
        [(i, start, raw(tensor)[start : start + size]) for start in range(0, tensor.nbytes, size)]
        for i, tensor in enumerate(tensors)
    ]


def test_what_went_in_comes_out() -> None:
    staging = Staging(MANIFEST)
    for chunk in itertools.chain(*chunks(values())):
        staging.add(*chunk)
    assert all(map(torch.equal, staging.complete(), values()))
    assert staging.digest() == combine(digest_tensors(values()))


@given(st.data())
def test_tensors_come_in_any_order_and_interleaved(data: st.DataObject) -> None:
    left = [part for part in chunks(values(), data.draw(st.integers(1, 40))) if part]
    staging = Staging(MANIFEST)
    while left:
        part = data.draw(st.sampled_from(left))
        staging.add(*part.pop(0))
        left = [part for part in left if part]
    assert all(map(torch.equal, staging.complete(), values()))


def test_what_was_staged_reaches_its_own_place() -> None:
    """The staged tensors share a storage: their places in it must not count as places in the engine."""
    placements, offset = [], 0
    for spec in SPECS[:2]:
        strides = contiguous_strides(spec.shape)
        placements.append(Placement(spec, (Block(0, offset, strides, 0, strides, spec.shape),)))
        offset += 256
    arenas = HostArenas([Arena.create("engine", offset)], placements)
    staging = Staging(arenas.manifest)
    for chunk in itertools.chain(*chunks(values()[:2])):
        staging.add(*chunk)
    arenas.write(staging.complete())
    assert all(torch.equal(p.gather(arenas.arenas), v) for p, v in zip(placements, values(), strict=False))
    assert arenas.digest() == staging.digest()


@pytest.mark.parametrize("piece", [1, 40, 1 << 20])
def test_a_worker_takes_it_through_little_memory(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Row by row, a few at once, or whole: to places that are ranges, strided, a part of another's, or empty."""
    monkeypatch.setattr(staging_module, "PIECE_BYTES", piece)
    specs = [
        TensorSpec(name, "float32", shape)
        for name, shape in {"a": (6, 4), "b": (), "c": (0, 4), "d": (4, 4)}.items()
    ]
    manifest = Manifest(tuple(specs))
    staging = Staging(manifest)
    values = [torch.randn(spec.shape) for spec in specs]
    for tensor, value in zip(staging._tensors(), values, strict=True):
        tensor.copy_(value)
    arena, offset, placements = Arena.create("engine", 1 << 12), 0, []
    for spec in specs:
        strides = contiguous_strides(spec.shape)
        turned = strides[::-1] if spec.name == "d" else strides
        placements.append(Placement(spec, (Block(0, offset, turned, 0, strides, spec.shape),)))
        offset += align(max(spec.nbytes, 1))
    largest: list[int] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        largest.append(tensor.nbytes)
        return to(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    offsets = {spec.name: at for spec, at in zip(manifest, manifest.offsets, strict=False)}
    unstage(staging.arena, offsets, placements, [arena])
    assert max(largest) <= max(piece, 16)
    for placement, value in zip(placements, values, strict=True):
        assert torch.equal(placement.gather([arena]), value)


def test_ranks_that_differ_have_no_digest() -> None:
    spec = SPECS[0]
    strides = contiguous_strides(spec.shape)
    blocks = tuple(Block(rank, 0, strides, 0, strides, spec.shape) for rank in range(2))
    arenas = HostArenas([Arena.create(f"rank{rank}", 256) for rank in range(2)], [Placement(spec, blocks)])
    arenas.write(values()[:1])
    assert arenas.digest() == combine(digest_tensors(values()[:1]))
    arenas.arenas[0].tensor(0, (1,), torch.uint8).add_(1)
    with pytest.raises(DataLoss, match=f"different values of {spec.name}"):
        arenas.digest()


@pytest.mark.parametrize(
    ("chunk", "error", "text"),
    [
        ((5, 0, b"x"), InvalidArgument, "the manifest has 5 tensors, not 6"),
        ((2**32 - 1, 0, b"x"), InvalidArgument, "the manifest has 5 tensors"),
        ((0, 8, b"x"), FailedPrecondition, "a: chunk at byte 8, but byte 0 is next"),
        (
            (0, 2**64 - 1, b"x"),
            FailedPrecondition,
            "a: chunk at byte 18446744073709551615, but byte 0 is next",
        ),
        ((0, 0, b"x" * 31), InvalidArgument, "a has 30 bytes, not 31"),
        ((2, 0, b"x"), InvalidArgument, "empty has 0 bytes, not 1"),
    ],
)
def test_chunks_that_are_none(chunk: tuple[int, int, bytes], error: type[Exception], text: str) -> None:
    staging = Staging(MANIFEST)
    with pytest.raises(error, match=text):
        staging.add(*chunk)
    for good in itertools.chain(*chunks(values())):  # and nothing was taken of it
        staging.add(*good)
    assert all(map(torch.equal, staging.complete(), values()))


def test_no_byte_is_taken_twice() -> None:
    staging = Staging(MANIFEST)
    first, second, *_ = chunks(values())[0]
    staging.add(*first)
    for again in (first, (0, 4, b"1234")):
        with pytest.raises(FailedPrecondition, match="byte 8 is next"):
            staging.add(*again)
    staging.add(*second)


def test_empty_chunks_are_nothing() -> None:
    staging = Staging(MANIFEST)
    staging.add(0, 0, b"")
    staging.add(2, 0, b"")
    for chunk in itertools.chain(*chunks(values())):
        staging.add(*chunk)
    staging.add(0, 30, b"")
    assert all(map(torch.equal, staging.complete(), values()))


def test_every_tensor_that_lacks_bytes_is_named() -> None:
    staging = Staging(MANIFEST)
    staging.add(0, 0, raw(values()[0])[:8])
    staging.add(1, 0, raw(values()[1]))
    with pytest.raises(FailedPrecondition) as caught:
        staging.complete()
    assert caught.value.reason == Reason.UPDATE_ORDER
    assert {(v.field, v.description) for v in caught.value.violations} == {
        ("a", "8 of 30 bytes arrived"),
        ("scalar", "0 of 8 bytes arrived"),
        ("flags", "0 of 3 bytes arrived"),
    }


def test_a_manifest_of_nothing() -> None:
    staging = Staging(Manifest(()))
    assert staging.complete() == []
    assert staging.digest() == combine([])


@pytest.mark.parametrize("used", [False, True])
def test_a_trainers_memory_is_given_back_when_it_is_gone_and_its_update_over(used: bool) -> None:
    """Whoever still has the object: a traceback keeps it for long."""
    stage = MappedStaging(MANIFEST)
    fd = stage.arena.fd
    if used:
        stage.use()
    stage.close()
    if used:
        assert os.fstat(fd).st_size == stage.arena.size, "the update under way reads it"
        stage.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
