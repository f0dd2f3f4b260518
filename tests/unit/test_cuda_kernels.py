"""What the CUDA kernels compute, without a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.host_kernels import compiled, host_launch
from weight_transfer.arena import Arena
from weight_transfer.cuda import digest as cuda_digest
from weight_transfer.cuda import kernels
from weight_transfer.cuda import write as cuda_write
from weight_transfer.digest import digest_tensor, digest_tensors, finish, finished
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.write import write

FLOATS = {torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16"}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    return partial(compiled, tmp_path_factory.mktemp("kernels"))


def test_the_source_is_all_of_the_files() -> None:
    for name in ("write", "digest"):
        text = kernels.source(name)
        assert "#pragma once" not in text
        assert f" {name}(" in text
        assert "add_up" in text


def test_digests_are_the_hosts(build: Callable[..., ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    library = build("digest", CHUNK="(1ULL<<17)")
    monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", host_launch(library))
    raw = torch.randint(0, 256, ((1 << 19) + 64,), dtype=torch.uint8)
    sizes = [0, 1, 7, 8, 9, 16, 24, 4095, 1 << 17, (1 << 17) + 3, (1 << 19) + 1]
    tensors = [raw[offset : offset + size] for size in sizes for offset in (0, 1, 8, 16)]
    found = cuda_digest.Sums.of(tensors)()
    nbytes = np.array([tensor.nbytes for tensor in tensors], np.uint64)
    assert finished(found.numpy(), nbytes) == digest_tensors(tensors)


def test_sums_are_finished_alike() -> None:
    totals = torch.randint(-(2**63), 2**63 - 1, (100,))
    nbytes = np.arange(100, dtype=np.uint64) * np.uint64(977)
    each = [finish(total, int(size)) for total, size in zip(totals.tolist(), nbytes, strict=True)]
    assert finished(totals.numpy(), nbytes) == each


def whole(shape: tuple[int, ...], offset: int = 0) -> list[Block]:
    strides = contiguous_strides(shape)
    return [Block(0, offset, strides, 0, strides, shape)]


LAYOUTS = {
    "whole": ((512, 96), whole((512, 96), 256)),
    "a unit": ((8,), whole((8,))),
    "several blocks and an end": ((9, 8200), whole((9, 8200))),
    "columns": (
        (64, 48),
        [Block(0, 0, (16, 1), 0, (48, 1), (64, 16)), Block(0, 4096, (32, 1), 16, (48, 1), (64, 32))],
    ),
    "rows of a wider matrix": ((640, 96), [Block(0, 0, (104, 1), 0, (96, 1), (640, 96))]),
    "odd": ((33, 7), whole((33, 7))),
    "empty": ((0, 8), whole((0, 8))),
}


PARTS = {
    "rows": ((64, 96), Block(0, 256, (96, 1), 32 * 96, (96, 1), (32, 96))),
    "columns": ((64, 96), Block(0, 512, (48, 1), 48, (96, 1), (64, 48))),
    "odd": ((33, 14), Block(0, 0, (7, 1), 7, (14, 1), (33, 7))),
    "all": ((512,), Block(0, 64, (1,), 0, (1,), (512,))),
}


def test_what_a_worker_has_of_a_tensor_is_scattered_again_and_again(
    build: Callable[..., ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build("write", SOURCE="bf16", TARGET="bf16", TILE="(1ULL<<15)")
    monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", host_launch(library))
    arenas = [Arena.create("test", 1 << 16) for _ in PARTS]
    items = [
        (
            Placement(TensorSpec(name, "bfloat16", shape), (replace(block, arena=i),)),
            torch.zeros(shape, dtype=torch.bfloat16),
        )
        for i, (name, (shape, block)) in enumerate(PARTS.items())
    ]
    scatter = cuda_write.scattering(items, arenas)
    for seed in range(2):
        torch.manual_seed(seed)
        for _, tensor in items:
            tensor.copy_(torch.randn(tensor.shape))
        scatter()
        for (placement, tensor), arena in zip(items, arenas, strict=True):
            ((part, place),) = placement.pairs(arenas, tensor)
            assert torch.equal(place, part), placement.spec.name
            assert int(arena.tensor(0, (arena.size,), torch.uint8).count_nonzero()) <= part.nbytes
    assert cuda_write.scattering([], arenas)() is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_writing_is_casting_and_copying(
    build: Callable[..., ctypes.CDLL],
    monkeypatch: pytest.MonkeyPatch,
    source: torch.dtype,
    target: torch.dtype,
) -> None:
    library = build("write", SOURCE=FLOATS[source], TARGET=FLOATS[target], TILE="(1ULL<<15)")
    monkeypatch.setattr(kernels, "kernel", lambda *_, **__: None)
    monkeypatch.setattr(kernels, "launch", host_launch(library))
    torch.manual_seed(0)
    items, arenas, others = [], [], []
    for i, (shape, blocks) in enumerate(LAYOUTS.values()):
        arenas.append(Arena.create("test", 1 << 20))
        others.append(Arena.create("test", 1 << 20))
        spec = TensorSpec("t", str(target).removeprefix("torch."), shape)
        placement = Placement(spec, tuple(Block(i, *list(vars(block).values())[1:]) for block in blocks))
        value = torch.randn(shape).mul_(100).to(source)
        if value.numel() > 4:
            value.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-8, 65505.0])
        items.append((placement, value))
    found = cuda_write.write(items, arenas)
    assert found == [digest_tensor(value.to(target)) for _, value in items]
    assert found == write(items, others)
    for mine, theirs in zip(arenas, others, strict=True):  # all of it: nothing else was touched
        assert torch.equal(*(a.tensor(0, (a.size,), torch.uint8) for a in (mine, theirs)))
    assert cuda_write.write(items, arenas) == found, "by the plan that the first made"
    assert cuda_write.again(items, arenas) is None, "of what the kernel cannot take"
    whole = [item for item, name in zip(items, LAYOUTS, strict=True) if name != "odd"]
    again = cuda_write.again(whole, arenas)
    for _, value in whole:
        value.neg_()
    assert again is not None
    assert again() == [digest_tensor(value.to(target)) for _, value in whole]
    assert cuda_write.again([(whole[0][0], whole[0][1].t().contiguous().t())], arenas) is None
