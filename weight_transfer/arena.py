"""Host memory that holds the engine's weights and that another process can map."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Self

import torch

from weight_transfer._core import HostArena

ALIGNMENT = 256
"""Bytes. Tensors in an arena start at multiples of this: enough for any vector load, on CPU and GPU."""

_MAX_SIZE = 2**63 - 1


def align(n: int) -> int:
    """The smallest multiple of ``ALIGNMENT`` that is not below ``n`` (bytes, not negative)."""
    if n < 0:
        raise ValueError(f"cannot align a negative number: {n}")
    return -(-n // ALIGNMENT) * ALIGNMENT


class Arena:
    """A block of host memory, mapped shared and writable; its size never changes.

    Tensors made from it keep the mapping alive, so it may be dropped before them. The memory itself lives
    until the last process that has it mapped is done.
    """

    def __init__(self, memory: HostArena) -> None:
        self._memory = memory

    @classmethod
    def create(cls, name: str, size: int) -> Self:
        """New zeroed memory of ``size`` bytes. ``name`` (1 to 249 bytes) only shows in ``/proc``.

        Raises ValueError for a bad name or size, OSError when the system refuses.
        """
        return cls(HostArena.create(name, _checked_size(size)))

    @classmethod
    def open(cls, fd: int, size: int) -> Self:
        """Map the arena behind ``fd``, made by ``create`` here or elsewhere. ``fd`` stays the caller's.

        Raises ValueError when ``fd`` is not sealed memory of exactly ``size`` bytes, OSError when it is
        not open.
        """
        return cls(HostArena.open(fd, _checked_size(size)))

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

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor over the arena's bytes from ``offset``: no copy, and a storage of its own.

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
            tensor = torch.empty(0, dtype=dtype, device="cpu")
            if count == 0:
                return tensor.new_empty(shape)
            # frombuffer keeps a reference to the memory for as long as the storage lives.
            flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=offset, count=nbytes)
            return tensor.set_(flat.untyped_storage(), 0, shape)  # type: ignore[call-overload,no-any-return]


def _checked_size(size: int) -> int:
    if not 0 < size <= _MAX_SIZE:
        raise ValueError(f"arena size must be positive and fit 63 bits, not {size}")
    return size
