"""The order-aware 64-bit digest of tensors; ``csrc/digest.hpp`` has its definition.

The functions on addresses need no torch. They trust their caller: the memory must be readable and stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weight_transfer import _core

if TYPE_CHECKING:
    import torch

WORD = 8
"""Bytes of one digest word."""


def partial(address: int, nbytes: int, first_word: int = 0, *, threads: int = 0) -> int:
    """The digest sum's part over one contiguous range that begins at word ``first_word`` of its tensor.

    ``nbytes`` must be a multiple of ``WORD`` unless the range ends the tensor. Add the parts modulo 2**64, in
    any order, then ``finish`` the sum. ``threads`` 0 chooses by size. Raises ValueError for a null address
    or a range that overflows.
    """
    return _core.digest_partial(address, nbytes, first_word, threads)


def finish(total: int, nbytes: int) -> int:
    """The digest of a tensor of ``nbytes`` bytes whose parts add up to ``total`` (modulo 2**64)."""
    return _core.digest_finish(total % 2**64, nbytes)


def digest_regions(regions: Sequence[tuple[int, int]], *, threads: int = 0) -> list[int]:
    """The digest of each ``(address, nbytes)``, in order. Raises ValueError as ``partial`` does."""
    return _core.digest_regions(regions, threads)


def combine(digests: Sequence[int]) -> int:
    """One digest of an ordered list of digests, each in [0, 2**64)."""
    return _core.digest_combine(digests)


def digest_tensor(tensor: torch.Tensor) -> int:
    """The digest of one tensor's elements in row-major order; see ``digest_tensors``."""
    return digest_tensors([tensor])[0]


def digest_tensors(tensors: Sequence[torch.Tensor], *, threads: int = 0) -> list[int]:
    """The digest of each tensor's elements in row-major order, whatever its strides. All must be on one device.

    Shape and dtype do not count, only bytes. A tensor that is not contiguous is copied first, so hand over
    contiguous ones where memory matters. On a CUDA device this waits for torch's current stream.

    Raises ValueError for tensors that are neither in host memory nor all on one CUDA device.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or not {device.type for device in devices} <= {"cpu", "cuda"}:
        raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}: not all in one place")
    if devices and devices.pop().type == "cuda":
        from weight_transfer.cuda.digest import sums

        return [finish(total, tensor.nbytes) for total, tensor in zip(sums(tensors), tensors, strict=True)]
    held = [tensor.detach().contiguous() for tensor in tensors]
    return _core.digest_regions([(tensor.data_ptr(), tensor.nbytes) for tensor in held], threads)
