"""Digest sums of tensors on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_transfer.cuda import kernels

_CHUNK = 1 << 17  # bytes for one block


class Sums:
    """The digest sum of each of these tensors' elements, as often as it is wanted.

    What says where they lie is brought to the device once: making it takes longer than reading a gigabyte.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Of contiguous tensors, at least one and all on one CUDA device. They must keep their memory."""
        self._tensors = list(tensors)
        self._device = self._tensors[0].device
        self._blocks, columns = 0, []
        for tensor in self._tensors:
            columns.append((tensor.data_ptr(), tensor.nbytes, self._blocks))
            self._blocks += max(-(-tensor.nbytes // _CHUNK), 1)
        self._table = kernels.table(list(zip(*columns, strict=True)), self._device)
        self._kernel = kernels.kernel("digest", CHUNK=f"{_CHUNK}ULL")

    def __call__(self) -> torch.Tensor:
        """The sums, int64 on the device, in the order of its current stream. Waits for nothing."""
        found = torch.zeros(len(self._tensors), dtype=torch.int64, device=self._device)
        address, nbytes, first = self._table
        kernels.launch(
            self._kernel, self._blocks, self._device, address, nbytes, first, len(self._tensors), found
        )
        return found
