"""The order-aware 64-bit digest of tensors; ``csrc/digest.hpp`` has its definition.

The functions on addresses need no torch. They trust their caller: the memory must be readable and stay so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weight_transfer import _core

if TYPE_CHECKING:
    import numpy as np
    import torch

    from weight_transfer.cuda.digest import Sums

_KEY_STEP = 0x9E3779B97F4A7C15
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


def finished(totals: np.ndarray[Any, Any], nbytes: np.ndarray[Any, Any]) -> list[int]:
    """`finish` of many: 64-bit totals, and bytes as np.uint64."""
    import numpy as np

    x = (totals.view(np.uint64) ^ nbytes) ^ np.uint64(_KEY_STEP)
    for shift, factor in ((27, 0x3C79AC492BA7B653), (33, 0x1C69B3F74AC4AE35)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    found: list[int] = (x ^ (x >> np.uint64(27))).tolist()
    return found


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
    return Digester([tensor.detach().contiguous() for tensor in tensors], threads=threads).digests()


class Digester:
    """Digests the same tensors again and again: what says where they lie is made once."""

    def __init__(self, tensors: Sequence[torch.Tensor], *, threads: int = 0) -> None:
        """Of contiguous tensors, which must keep their memory. Raises ValueError as `digest_tensors` does."""
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1 or not {device.type for device in devices} <= {"cpu", "cuda"}:
            raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}: not all in one place")
        self._tensors = list(tensors)
        self._threads = threads
        self._sums: Sums | None = None
        if devices and devices.pop().type == "cuda":
            import numpy as np

            from weight_transfer.cuda.digest import Sums

            self._sums = Sums.of(self._tensors)
            self._nbytes = np.array([tensor.nbytes for tensor in self._tensors], np.uint64)
        else:
            self._regions = [(tensor.data_ptr(), tensor.nbytes) for tensor in self._tensors]

    def digests(self) -> list[int]:
        """The digest of each tensor as it is now. On a CUDA device this waits for torch's current stream."""
        return self.later()()

    def later(self) -> Callable[[], list[int]]:
        """Begin, in the order of torch's current stream where that is a device's; call the result for the digests.

        It waits for nothing that was put into the stream afterwards.
        """
        if self._sums is None:
            found = _core.digest_regions(self._regions, self._threads)
            return lambda: found
        totals, there = self._sums.later()

        def read() -> list[int]:
            there.synchronize()
            return finished(totals.numpy(), self._nbytes)

        return read

    def look(self) -> torch.Tensor:
        """Something that compares equal, by torch.equal, as long as the tensors' bytes do: int64, where they are.

        On a CUDA device this is in the order of torch's current stream, and waits for nothing.
        """
        import torch

        if self._sums is not None:
            return self._sums()
        found = _core.digest_regions(self._regions, self._threads)
        return torch.tensor([digest - (digest >> 63 << 64) for digest in found], dtype=torch.int64)
