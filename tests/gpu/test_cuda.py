"""Memory of a CUDA device that two mappings share, and the kernels over it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from weight_transfer import patches
from weight_transfer.arena import Arena
from weight_transfer.cuda.devices import device_of, uuid_of
from weight_transfer.digest import digest_tensor, digest_tensors, finished
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.reading import Reading
from weight_transfer.tiles import HEADER, TILE_BYTES, Tiling, tiling
from weight_transfer.windows import windows
from weight_transfer.write import write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
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

    def attach() -> None:
        other = Arena.open(arena.fd, arena.size, arena.device)
        other.tensor(0, (16,), torch.uint8).fill_(1)

    attach()  # the first use of a device opens what it needs
    before, descriptors = free(), len(os.listdir("/proc/self/fd"))
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
    assert free() == before
    assert memory[512:516].tolist() == [7] * 4
    assert memory.sum() == 28
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


#: (dtype, elements, byte): aligned and not, tiles and a bit, ends that are no word's, many tiles.
CHANGING = [
    ("bfloat16", 3 * TILE_BYTES // 2 + 5, 0),
    ("float32", 4099, 3 * TILE_BYTES + 12),
    ("bfloat16", 1, 3 * TILE_BYTES + 12 + 4 * 4099),
    ("float16", TILE_BYTES // 2, 6 * TILE_BYTES),
    ("bfloat16", 17, 7 * TILE_BYTES + 6),
    ("float64", 33, 7 * TILE_BYTES + 1024),
    ("float16", TILE_BYTES, 8 * TILE_BYTES + 2),
    ("bfloat16", 8 * MIB + 3, 16 * TILE_BYTES),
]
SIZE = 32 * MIB


def changing() -> tuple[list[Placement], Tiling, torch.Tensor]:
    """Some tensors, and which bytes are theirs."""
    policy = [
        Placement(TensorSpec(str(i), dtype, (n,)), (Block(0, at, (1,), 0, (1,), (n,)),))
        for i, (dtype, n, at) in enumerate(CHANGING)
    ]
    (window,) = windows(policy)
    theirs = torch.zeros(SIZE, dtype=torch.bool, device="cuda")
    for placement in policy:
        theirs[placement.blocks[0].arena_offset :][: placement.spec.nbytes] = True
    return policy, tiling(window, policy), theirs


def bytes_of(arena: Arena) -> torch.Tensor:
    return arena.tensor(0, (SIZE,), torch.uint8)


def filled(raw: torch.Tensor) -> Arena:
    arena = Arena.create("test", SIZE, "cuda")
    bytes_of(arena).copy_(raw)
    return arena


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.3, 1.0])
def test_changes_are_found_and_placed_to_the_bit(share: float) -> None:
    """Random bits: NaNs of every payload and both zeros are among them."""
    policy, tiles, theirs = changing()
    torch.manual_seed(int(share * 1e5))
    before = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda")
    after = before.clone().view(torch.int16)
    changed = torch.rand(len(after), device="cuda") < share
    after[changed] ^= torch.randint(1, 1 << 15, after.shape, device="cuda").to(torch.int16)[changed]
    after = after.view(torch.uint8)
    count = int((changed & theirs.view(-1, 2)[:, 0]).sum())
    now, base, live, staged = filled(after), filled(before), filled(before), filled(before)
    want = torch.where(theirs, after, before)
    digests = digest_tensors([placement.view([now]) for placement in policy])
    nbytes = np.array([placement.spec.nbytes for placement in policy], np.uint64)

    room = torch.tensor([count], device="cuda")
    message = torch.full((tiles.words(count) + 8,), 0x5A5A5A5A, dtype=torch.int32, device="cuda")
    message[:HEADER] = 0
    sums = torch.zeros(len(policy), dtype=torch.int64, device="cuda")
    patches.find(tiles, [now], [base])(room, sums, message)
    assert int(message[0]) == count
    assert (message[tiles.words(count) :] == 0x5A5A5A5A).all()
    assert torch.equal(bytes_of(base), want)
    assert torch.equal(bytes_of(now), after)
    assert finished(sums.cpu().numpy(), nbytes) == digests

    # The host's own, which tests without a device compare with torch, takes what the kernel found.
    host = Arena.create("test", SIZE)
    bytes_of(host).copy_(before)
    patches.patch(tiles, [host])(room.cpu(), None, message.cpu(), write=True)
    assert torch.equal(bytes_of(host), want.cpu())

    for arena, write_now in ((staged, False), (live, True)):
        sums.zero_()
        patches.patch(tiles, [arena])(room, sums, message, write=write_now)
        assert finished(sums.cpu().numpy(), nbytes) == digests
        assert torch.equal(bytes_of(arena), want if write_now else before)
    patches.patch(tiles, [staged])(room, None, message, write=True)
    assert torch.equal(bytes_of(staged), want)


def test_a_window_without_room_for_its_changes_is_not_written() -> None:
    policy, tiles, _ = changing()
    before, after = (torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda") for _ in range(2))
    now, base, live = filled(after), filled(before), filled(before)
    room = torch.tensor([100], device="cuda")
    message = torch.full((tiles.words(100) + 8,), 0x5A5A5A5A, dtype=torch.int32, device="cuda")
    message[:HEADER] = 0
    sums = torch.zeros(len(policy), dtype=torch.int64, device="cuda")
    patches.find(tiles, [now], [base])(room, sums, message)
    assert int(message[0]) > 100
    assert (message[tiles.words(100) :] == 0x5A5A5A5A).all()
    assert digest_tensors([p.view([base]) for p in policy]) == digest_tensors([p.view([now]) for p in policy])
    sums.zero_()
    patches.patch(tiles, [live])(room, sums, message, write=True)
    assert not sums.any()
    assert torch.equal(bytes_of(live), before)


def test_a_message_that_is_none_writes_nothing_outside_its_window() -> None:
    policy, tiles, theirs = changing()
    for seed in range(10):
        torch.manual_seed(seed)
        message = torch.randint(-(2**31), 2**31 - 1, (tiles.words(1000),), device="cuda").to(torch.int32)
        if seed % 2:
            message[HEADER : HEADER + 2 * tiles.tiles] %= 500
        message[0] = 900
        live = filled(torch.zeros(SIZE, dtype=torch.uint8))
        sums = torch.zeros(len(policy), dtype=torch.int64, device="cuda")
        patches.patch(tiles, [live])(torch.tensor([1000], device="cuda"), sums, message, write=True)
        assert not bytes_of(live)[~theirs].any()
