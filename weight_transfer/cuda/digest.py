"""Digest sums of what lies on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from weight_transfer.cuda import kernels

_CHUNK = 1 << 17  # bytes for one block


class Sums:
    """The digest sum of each of some owners' rows, as often as it is wanted.

    What says where they lie is brought to the device once: making it takes longer than reading a gigabyte.
    """

    def __init__(self, rows: Any, owners: Any, count: int, device: torch.device) -> None:
        """Of memory on `device`, which must stay.

        Args:
            rows: numbers of shape (n, 6), as `weight_transfer.parts.Rows` has them, n at least 1. Those of several rows
                are of whole words.
            owners: whose each is, in [0, count).
        """
        rows = np.asarray(rows, np.uint64).reshape(-1, 6)
        chunk = np.uint64(_CHUNK)
        counts = np.maximum((rows[:, 1] * rows[:, 2] + chunk - np.uint64(1)) // chunk, 1).astype(np.int64)
        firsts = np.cumsum(counts) - counts
        self._device, self._count = device, count
        self._blocks = int(counts.sum())
        columns = [*rows.T, np.asarray(owners, np.uint64), firsts.astype(np.uint64)]
        self._regions = kernels.table(np.stack(columns, 1), device)
        self._region_of = kernels.owners(counts, device)
        self._kernel = kernels.kernel("digest", CHUNK=f"{_CHUNK}ULL")

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Sums:
        """One sum of each of these contiguous tensors, at least one and all on one CUDA device."""
        count = len(tensors)
        rows = np.zeros((count, 6), np.uint64)
        rows[:, 0] = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.uint64, count)
        rows[:, 1] = np.fromiter((tensor.nbytes for tensor in tensors), np.uint64, count)
        rows[:, 2] = 1
        return cls(rows, np.arange(count), count, tensors[0].device)

    def __call__(self) -> torch.Tensor:
        """The sums, int64 on the device, in the order of its current stream. Waits for nothing."""
        found = torch.zeros(self._count, dtype=torch.int64, device=self._device)
        kernels.launch(self._kernel, self._blocks, self._device, self._regions, self._region_of, found)
        return found

    def later(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The sums in host memory, and the event after which they are there. Waits for nothing."""
        found = torch.empty(self._count, dtype=torch.int64, pin_memory=True)
        found.copy_(self(), non_blocking=True)
        there: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return found, there
