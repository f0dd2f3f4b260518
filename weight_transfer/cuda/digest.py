"""Digest sums of tensors on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weight_transfer.cuda import kernels

_CHUNK = 1 << 17  # bytes for one block


def sums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The digest sum of each tensor's elements in row-major order; all on one CUDA device."""
    held = [tensor.detach().contiguous() for tensor in tensors]
    device = held[0].device
    first, columns = 0, []
    for tensor in held:
        columns.append((tensor.data_ptr(), tensor.nbytes, first))
        first += max(-(-tensor.nbytes // _CHUNK), 1)
    totals = torch.zeros(len(held), dtype=torch.int64, device=device)
    table = kernels.table(list(zip(*columns, strict=True)), device)
    digest = kernels.kernel("digest", CHUNK=f"{_CHUNK}ULL")
    kernels.launch(digest, first, device, table[0], table[1], table[2], len(held), totals)
    return kernels.numbers(totals)
