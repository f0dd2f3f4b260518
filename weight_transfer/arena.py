"""Memory that holds the engine's weights and that another process can map: a host's, or a CUDA device's."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Self

import torch

from weight_transfer._core import DeviceArena, HostArena

ALIGNMENT = 256
"""Bytes. Tensors in an arena start at multiples of this: enough for any vector load, on CPU and GPU."""

_MAX_SIZE = 2**63 - 1


def align(n: int) -> int:
    """The smallest multiple of ``ALIGNMENT`` that is not below ``n`` (bytes, not negative)."""
    if n < 0:
        raise ValueError(f"cannot align a negative number: {n}")
    return -(-n // ALIGNMENT) * ALIGNMENT


class Arena:
    """A block of memory, mapped shared and writable; its size never changes.

    Tensors made from it keep the mapping alive, so it may be dropped before them. The memory itself lives
    until the last process that has it mapped, or holds its descriptor, is done. A device's is CUDA's virtual memory
    with a POSIX descriptor (cuMemCreate), which needs no allocator's cooperation on either side; on devices that have
    none, and of memory that others allocated, it has a handle of classic CUDA IPC (cuIpcGetMemHandle), and lives as
    long as in the process that allocated it.
    """

    def __init__(self, memory: HostArena | DeviceArena, keep: torch.Tensor | None = None) -> None:
        self._memory = memory
        self._keep = keep

    @classmethod
    def create(cls, name: str, size: int, device: torch.device | str = "cpu") -> Self:
        """New memory of ``size`` bytes; a host's is zeroed. ``name`` (1 to 249 bytes) shows in ``/proc`` for a host's.

        Raises ValueError for a bad name or size, OSError when the system refuses, RuntimeError when the CUDA
        driver does, naming its error.
        """
        size, index = _checked_size(size), _cuda_index(device)
        if index is None:
            return cls(HostArena.create(name, size))
        try:
            return cls(DeviceArena.create(index, size))
        except RuntimeError:
            torch.cuda.empty_cache()  # the driver has not what torch's allocator keeps
            return cls(DeviceArena.create(index, size))

    @classmethod
    def adopt(cls, tensor: torch.Tensor) -> Self:
        """The memory of a contiguous tensor on a CUDA device, which torch's allocator, or whoever, has allocated.

        Other processes of the host can ``open`` it; the tensor is kept meanwhile.

        Raises ValueError for a tensor that is empty, strided or elsewhere, and for virtual memory, such as that of
        ``expandable_segments``, which has no such handle. RuntimeError when the CUDA driver refuses.
        """
        if tensor.device.type != "cuda" or not tensor.is_contiguous() or not tensor.numel():
            raise ValueError(
                f"a contiguous tensor on a CUDA device is needed, not {tuple(tensor.shape)} on {tensor.device}"
            )
        return cls(DeviceArena.adopt(tensor.data_ptr(), tensor.device.index, tensor.nbytes), tensor)

    @classmethod
    def open(cls, fd: int, size: int, device: torch.device | str = "cpu") -> Self:
        """Map the arena behind ``fd``, made by ``create`` here or elsewhere. ``fd`` stays the caller's.

        Raises ValueError when ``fd`` is not sealed memory of exactly ``size`` bytes, OSError when it is
        not open, RuntimeError when it is not memory of that CUDA device, or has an IPC handle and is this process's.
        """
        size, index = _checked_size(size), _cuda_index(device)
        return cls(HostArena.open(fd, size) if index is None else DeviceArena.open(fd, index, size))

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        memory = self._memory
        return torch.device("cpu") if isinstance(memory, HostArena) else torch.device("cuda", memory.device)

    @property
    def fd(self) -> int:
        """The descriptor to pass to another process; belongs to the arena, and lives as long."""
        return self._memory.fd

    @property
    def size(self) -> int:
        """Bytes."""
        return self._memory.size

    @property
    def address(self) -> int:
        """Where the memory is mapped in this process."""
        return self._memory.address

    def forget(self) -> None:
        """Give a host's memory back to the system, in all processes that have it mapped: it is zero then, and comes
        again where it is touched. Takes tenths of a second for each GiB, in which other threads of Python run.

        Raises OSError when the system refuses.
        """
        if isinstance(self._memory, HostArena):
            self._memory.forget()

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor over the arena's bytes from ``offset``: no copy, and a storage of its own.

        The storage covers just this tensor. Raises ValueError when the tensor does not lie within the
        arena or ``offset`` is not a multiple of the dtype's size.
        """
        shape = [operator.index(length) for length in shape]
        if any(length < 0 for length in shape):
            raise ValueError(f"shape {shape} has a negative length")
        if offset < 0:
            raise ValueError(f"offset {offset} is negative")
        if offset % dtype.itemsize:
            raise ValueError(f"offset {offset} is not a multiple of {dtype}'s {dtype.itemsize} bytes")
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if offset + nbytes > self.size:
            raise ValueError(
                f"{dtype} {shape} at offset {offset} ends at {offset + nbytes} of {self.size} bytes"
            )
        # Explicit device and no inference mode: engines build models under torch.device(...) contexts.
        with torch.inference_mode(False):
            tensor = torch.empty(0, dtype=dtype, device=self.device)
            if count == 0:
                return tensor.new_empty(shape)
            # Either keeps a reference to the memory for as long as the storage lives.
            if isinstance(self._memory, HostArena):
                flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=offset, count=nbytes)
            else:
                flat = torch.as_tensor(_Bytes(self._memory, offset, nbytes), device=self.device)
            return tensor.set_(flat.untyped_storage(), 0, shape)  # type: ignore[call-overload,no-any-return]


class _Bytes:
    """Bytes of a device's arena, as torch takes over others' memory."""

    def __init__(self, memory: DeviceArena, offset: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address + offset, False),
            "version": 3,
        }


def _cuda_index(device: torch.device | str) -> int | None:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"an arena cannot be on {device}: only on cpu and cuda")
    if device.type == "cpu":
        return None
    # Initializes CUDA too: torch takes over no memory before.
    return torch.cuda.current_device() if device.index is None else device.index


def _checked_size(size: int) -> int:
    if not 0 < size <= _MAX_SIZE:
        raise ValueError(f"arena size must be positive and fit 63 bits, not {size}")
    return size
