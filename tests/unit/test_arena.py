"""The host arena: what it gives, and what a hostile or broken peer may try."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from weight_transfer.arena import ALIGNMENT, Arena, align

SIZE = 1 << 16


@pytest.fixture
def arena() -> Arena:
    return Arena.create("tandem-test", SIZE)


def mapped(address: int) -> bool:
    return any(line.startswith(f"{address:x}-") for line in Path("/proc/self/maps").read_text().splitlines())


def test_create(arena: Arena) -> None:
    assert arena.size == SIZE
    assert arena.address % ALIGNMENT == 0
    assert fcntl.fcntl(arena.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert arena.tensor(0, (SIZE,), torch.uint8).eq(0).all()


def test_nobody_can_change_its_size(arena: Arena) -> None:
    for size in (0, SIZE - 1, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize("size", [0, -1, 2**63, 2**80])
def test_refuses_sizes(size: int, arena: Arena) -> None:
    with pytest.raises(ValueError, match="size must be positive and fit"):
        Arena.create("tandem-test", size)
    with pytest.raises(ValueError, match="size must be positive and fit"):
        Arena.open(arena.fd, size)


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 250])
def test_refuses_names(name: str) -> None:
    with pytest.raises(ValueError, match="name must have 1 to 249 bytes"):
        Arena.create(name, SIZE)


def test_create_reports_what_the_system_refuses() -> None:
    with pytest.raises(OSError, match="mmap") as caught:
        Arena.create("tandem-test", 2**62)
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn],
    ids=str,
)
def test_tensor_is_a_storage_of_its_own(arena: Arena, dtype: torch.dtype) -> None:
    tensor = arena.tensor(256, (4, 6), dtype)
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (dtype, (4, 6), True)
    assert tensor.data_ptr() == arena.address + 256
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert not tensor._is_view()


def test_tensors_share_the_memory(arena: Arena) -> None:
    other = Arena.open(arena.fd, SIZE)
    assert other.address != arena.address
    arena.tensor(512, (3,), torch.float32).copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert other.tensor(512, (3,), torch.float32).tolist() == [1, 2, 3]
    assert other.tensor(516, (), torch.float32).item() == 2


def test_tensor_heeds_no_device_or_inference_context(arena: Arena) -> None:
    """Engines build models under such contexts."""
    with torch.device("meta"), torch.inference_mode():
        tensor = arena.tensor(0, (2,), torch.float32)
    assert tensor.device.type == "cpu"
    assert not tensor.is_inference()
    torch.nn.Parameter(tensor).sum().backward()  # type: ignore[no-untyped-call]


def test_tensor_may_be_empty_even_at_the_end(arena: Arena) -> None:
    assert arena.tensor(SIZE, (3, 0), torch.float32).shape == (3, 0)


@pytest.mark.parametrize(
    ("offset", "shape", "dtype", "message"),
    [
        (0, (SIZE + 1,), torch.uint8, f"ends at {SIZE + 1} of {SIZE} bytes"),
        (SIZE - 4, (2,), torch.float32, f"ends at {SIZE + 4} of {SIZE} bytes"),
        (SIZE + 256, (0,), torch.float32, "ends at"),
        (0, (2**40, 2**40), torch.float64, "ends at"),
        (2**64, (1,), torch.uint8, "ends at"),
        (-4, (1,), torch.float32, "offset -4 is negative"),
        (2, (1,), torch.float32, "offset 2 is not a multiple of torch.float32's 4 bytes"),
        (0, (-1, -4), torch.float32, "negative length"),
    ],
)
def test_tensor_refuses(
    arena: Arena, offset: int, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arena.tensor(offset, shape, dtype)


def test_tensor_keeps_the_memory_alive() -> None:
    arena = Arena.create("tandem-test", SIZE)
    address = arena.address
    tensor = arena.tensor(0, (4,), torch.float32)
    view = tensor[2:]
    del arena, tensor
    gc.collect()
    assert mapped(address)
    view.fill_(7)
    assert view.tolist() == [7, 7]
    del view
    gc.collect()
    assert not mapped(address)


def test_open_leaves_the_descriptor_to_its_owner(arena: Arena) -> None:
    passed = os.dup(arena.fd)
    other = Arena.open(passed, SIZE)
    os.close(passed)
    assert other.fd not in (passed, arena.fd)
    assert fcntl.fcntl(other.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    own = other.fd
    del other
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(own)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 2 * SIZE, 1])
def test_open_refuses_another_size(arena: Arena, size: int) -> None:
    with pytest.raises(ValueError, match=f"arena has {SIZE} bytes, expected {size}"):
        Arena.open(arena.fd, size)


def test_open_refuses_memory_that_can_shrink() -> None:
    fd = os.memfd_create("tandem-test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        with pytest.raises(ValueError, match="not sealed against shrinking"):
            Arena.open(fd, SIZE)
    finally:
        os.close(fd)


def test_open_refuses_files_and_pipes() -> None:
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        file.truncate(SIZE)
        with pytest.raises(ValueError, match=r"not arena memory|not sealed"):
            Arena.open(file.fileno(), SIZE)
    ends = os.pipe()
    try:
        with pytest.raises(ValueError, match="not arena memory"):
            Arena.open(ends[0], SIZE)
    finally:
        for end in ends:
            os.close(end)


def test_open_refuses_closed_descriptors(arena: Arena) -> None:
    closed = os.dup(arena.fd)
    os.close(closed)
    with pytest.raises(OSError, match="F_DUPFD_CLOEXEC") as caught:
        Arena.open(closed, SIZE)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(ValueError, match="fd -1 is not a file descriptor"):
        Arena.open(-1, SIZE)


def test_refused_descriptors_do_not_leak(arena: Arena) -> None:
    gc.collect()  # what earlier tests left to the collector is not ours to count
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ValueError, match="expected"):
            Arena.open(arena.fd, SIZE + 1)
        with pytest.raises(OSError, match="mmap"):
            Arena.create("tandem-test", 2**62)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_memory_that_is_forgotten_is_zero_wherever_it_is_mapped(arena: Arena) -> None:
    there = Arena.open(arena.fd, arena.size)
    mine, theirs = (a.tensor(0, (a.size,), torch.uint8) for a in (arena, there))
    mine.fill_(7)
    blocks = os.fstat(arena.fd).st_blocks
    there.forget()
    assert os.fstat(arena.fd).st_blocks == 0 < blocks
    assert not mine.any()
    theirs[0] = 9
    assert mine[0] == 9


PEER = """
import sys, torch
from weight_transfer.arena import Arena
fd, size = map(int, sys.argv[1:])
numbers = Arena.open(fd, size).tensor(1024, (4,), torch.bfloat16)
assert numbers.tolist() == [1, 2, 3, 4], numbers
numbers.mul_(10)
"""


def test_two_processes_share_one_arena(arena: Arena) -> None:
    numbers = arena.tensor(1024, (4,), torch.bfloat16)
    numbers.copy_(torch.arange(1, 5))
    command = [sys.executable, "-c", PEER, str(arena.fd), str(SIZE)]
    subprocess.run(command, pass_fds=[arena.fd], check=True, timeout=120)
    assert numbers.tolist() == [10, 20, 30, 40]


def test_align() -> None:
    assert [align(n) for n in (0, 1, 255, 256, 257)] == [0, 256, 256, 256, 512]
    with pytest.raises(ValueError, match="negative"):
        align(-1)
