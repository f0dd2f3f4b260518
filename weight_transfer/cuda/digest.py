"""Digest sums of tensors on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
        nbytes = np.array([tensor.nbytes for tensor in self._tensors], np.uint64)
        counts = np.maximum((nbytes + np.uint64(_CHUNK - 1)) // np.uint64(_CHUNK), 1).astype(np.int64)
        firsts = np.cumsum(counts) - counts
        addresses = np.fromiter(map(torch.Tensor.data_ptr, self._tensors), np.uint64, len(self._tensors))
        self._blocks = int(counts.sum())
        self._regions = kernels.table(
            np.stack([addresses, nbytes, firsts.astype(np.uint64)], 1), self._device
        )
        self._region_of = kernels.owners(counts, self._device)
        self._kernel = kernels.kernel("digest", CHUNK=f"{_CHUNK}ULL")

    def __call__(self) -> torch.Tensor:
        """The sums, int64 on the device, in the order of its current stream. Waits for nothing."""
        found = torch.zeros(len(self._tensors), dtype=torch.int64, device=self._device)
        kernels.launch(self._kernel, self._blocks, self._device, self._regions, self._region_of, found)
        return found
