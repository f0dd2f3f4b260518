"""Memory of a CUDA device that two mappings share, and the kernels over it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda.devices import device_of, uuid_of
from weight_transfer.digest import digest_tensor, digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.reading import Reading
from weight_transfer.write import write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 1 << 20
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def free() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def test_two_mappings_are_one_memory() -> None:
    arena = Arena.create("test", 3 * MIB + 5, "cuda")
    other = Arena.open(arena.fd, arena.size, arena.device)
    assert arena.address != other.address
    mine, theirs = (a.tensor(512, (1000, 3), torch.bfloat16) for a in (arena, other))
    assert mine.device == torch.device("cuda", 0)
    assert mine.untyped_storage().nbytes() == 6000
    mine.copy_(torch.randn(1000, 3))
    assert torch.equal(mine, theirs)
    del arena, mine  # the other mapping keeps the memory
    assert theirs.float().abs().sum() > 0
    with pytest.raises(ValueError, match="ends at"):
        other.tensor(3 * MIB, (6,), torch.uint8)


def test_a_tensor_keeps_the_memory_that_its_arena_made() -> None:
    Arena.create("test", MIB, "cuda").tensor(0, (4,), torch.float32).fill_(7).eq(
        7
    ).all().item()  # loads the kernels
    gc.collect()
    torch.cuda.empty_cache()
    before = free()
    arena = Arena.create("test", 64 * MIB, "cuda")
    tensor = arena.tensor(0, (MIB,), torch.float32).fill_(7)
    del arena
    gc.collect()
    assert before - free() >= 64 * MIB
    assert tensor.eq(7).all()
    del tensor
    gc.collect()
    torch.cuda.empty_cache()
    assert free() == before


def test_a_thousand_attachments_leave_nothing() -> None:
    arena = Arena.create("test", 64 * MIB, "cuda")
    descriptors = len(os.listdir("/proc/self/fd"))

    def attach() -> None:
        other = Arena.open(arena.fd, arena.size, arena.device)
        other.tensor(0, (16,), torch.uint8).fill_(1)

    attach()
    before = free()
    for _ in range(1000):
        attach()
    assert free() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


OPENS = """
import sys, torch
from weight_transfer.arena import Arena
arena = Arena.open(int(sys.argv[1]), int(sys.argv[2]), "cuda")
for _ in range(1000):
    Arena.open(arena.fd, arena.size, "cuda").tensor(0, (16,), torch.uint8)
arena.tensor(1024, (4,), torch.float32).fill_(7)
torch.cuda.synchronize()
"""


def test_memory_of_torchs_is_opened_by_another_process() -> None:
    memory = torch.zeros(3 * MIB, device="cuda")
    arena = Arena.adopt(memory[256:2048])
    command = [sys.executable, "-c", OPENS, str(arena.fd), str(arena.size)]
    before = free()
    subprocess.run(command, pass_fds=[arena.fd], check=True, timeout=120)
    assert memory[512:516].tolist() == [7] * 4
    assert memory.sum() == 28
    assert free() == before
    with pytest.raises(RuntimeError, match="cuIpcOpenMemHandle: CUDA_ERROR"):
        Arena.open(arena.fd, arena.size, "cuda")


def test_virtual_memory_has_no_handle_to_adopt() -> None:
    arena = Arena.create("test", 4 * MIB, "cuda")
    with pytest.raises(ValueError, match="no handle of classic CUDA IPC: it is virtual memory"):
        Arena.adopt(arena.tensor(0, (16,), torch.uint8))
    with pytest.raises(ValueError, match="a contiguous tensor on a CUDA device is needed"):
        Arena.adopt(torch.ones(4, 4, device="cuda").t())


def test_what_is_no_arena_is_refused() -> None:
    arena = Arena.create("test", 4 * MIB, "cuda")
    with pytest.raises(RuntimeError, match=r"cuMem\w+: CUDA_ERROR"):
        Arena.open(arena.fd, 64 * MIB, "cuda")
    host = Arena.create("host", MIB)
    with pytest.raises(RuntimeError, match="cuMemImportFromShareableHandle: CUDA_ERROR"):
        Arena.open(host.fd, MIB, "cuda")
    with pytest.raises(ValueError, match=r"not arena memory|not sealed"):
        Arena.open(arena.fd, arena.size)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        Arena.create("test", 1 << 45, "cuda")
    assert torch.ones(8, device="cuda").sum() == 8  # no error sticks


def test_devices_are_known_by_uuid() -> None:
    device = torch.device("cuda", 0)
    assert device_of(uuid_of(device)) == device
    with pytest.raises(ValueError, match="does not see GPU-none, only GPU-"):
        device_of("GPU-none")


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 4095, 1 << 17, (1 << 17) + 3, 5 * MIB + 1])
@pytest.mark.parametrize("offset", [0, 1, 8, 16])
def test_a_digest_is_the_hosts(nbytes: int, offset: int) -> None:
    host = torch.randint(0, 256, (offset + nbytes,), dtype=torch.uint8)[offset:]
    there = torch.empty(offset + nbytes, dtype=torch.uint8, device="cuda")[offset:].copy_(host)
    assert digest_tensor(there) == digest_tensor(host)


def test_many_digests_at_once() -> None:
    host = [torch.randn(n, 3) for n in (1, 0, 70000, 17, 300)] + [torch.randn(40, 30).t()]
    assert digest_tensors([t.cuda() for t in host]) == digest_tensors(host)
    with pytest.raises(ValueError, match="not all in one place"):
        digest_tensors([host[0], host[0].cuda()])


def placed(shape: tuple[int, ...], blocks: list[Block], dtype: torch.dtype) -> Placement:
    return Placement(TensorSpec("t", str(dtype).removeprefix("torch."), shape), tuple(blocks))


def whole(shape: tuple[int, ...], offset: int = 0) -> list[Block]:
    strides = contiguous_strides(shape)
    return [Block(0, offset, strides, 0, strides, shape)]


LAYOUTS = {
    "whole": ((512, 96), whole((512, 96), 256)),
    "one row": ((4096,), whole((4096,))),
    "odd": ((33, 7), whole((33, 7))),
    "empty": ((0, 8), whole((0, 8))),
    "not aligned": ((64, 8), whole((64, 8), 8)),
    "transposed": ((64, 32), [Block(0, 0, (1, 64), 0, (32, 1), (64, 32))]),
    "columns": (
        (64, 48),
        [Block(0, 0, (16, 1), 0, (48, 1), (64, 16)), Block(0, 4096, (32, 1), 16, (48, 1), (64, 32))],
    ),
    "rows of a wider matrix": ((64, 48), [Block(0, 0, (80, 1), 0, (48, 1), (64, 48))]),
    "large": ((3000, 4096), whole((3000, 4096))),
}


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", [*FLOATS, torch.float64], ids=str)
def test_writing_is_casting_and_copying(source: torch.dtype, target: torch.dtype) -> None:
    torch.manual_seed(0)
    items, arenas = [], []
    for i, (shape, blocks) in enumerate(LAYOUTS.values()):
        arenas.append(Arena.create("test", 64 * MIB, "cuda"))
        arenas[i].tensor(0, (64 * MIB,), torch.uint8).zero_()
        placement = placed(shape, [Block(i, *list(vars(b).values())[1:]) for b in blocks], target)
        value = torch.randn(shape, device="cuda").mul_(100).to(source)
        if value.numel() > 4:
            value.view(-1)[:4] = torch.tensor([float("inf"), -0.0, 1e-8, 65505.0])
        items.append((placement, value))
    found = write(items, arenas)
    for (placement, value), digest in zip(items, found, strict=True):
        want = value.to(target)
        got = [place for _, place in placement.pairs(arenas, want)]
        for part, place in zip([p for p, _ in placement.pairs(arenas, want)], got, strict=True):
            assert torch.equal(part, place)
        assert digest == digest_tensor(want), placement
    assert Reading([placement for placement, _ in items], arenas).digests() == found
    assert write(items, arenas) == found  # by the plan that the first made
    gaps = arenas[list(LAYOUTS).index("rows of a wider matrix")].tensor(0, (64, 80), target)
    assert not gaps[:, 48:].any()


def test_writing_from_the_host() -> None:
    arena = Arena.create("test", MIB, "cuda")
    value = torch.randn(64, 64)
    placement = placed((64, 64), whole((64, 64)), torch.bfloat16)
    (digest,) = write([(placement, value)], [arena])
    assert digest == digest_tensor(value.bfloat16())
    assert torch.equal(placement.view([arena]).cpu(), value.bfloat16())
