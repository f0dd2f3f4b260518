"""Stream: the bytes travel in the update's own stream, and are received beside the live weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weight_transfer import digest as digests
from weight_transfer.manifest import Manifest
from weight_transfer.transports.base import Chunk, Moved, Piece, SourceTensor, WeightTransport


class StreamTransport(WeightTransport):
    """Cuts each tensor into chunks. One tensor is held at a time, never a copy of the model."""

    name = "stream"

    def __init__(self, manifest: Manifest, max_chunk_bytes: int) -> None:
        if max_chunk_bytes < 1:
            raise ValueError(f"max_chunk_bytes must be at least 1, is {max_chunk_bytes}")
        self._manifest = manifest
        self._max_chunk_bytes = max_chunk_bytes

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        parts = [0] * len(self._manifest)
        moved = sum(self._send(source, send, parts) for source in policy)
        return Moved(moved, digests.combine(parts))

    def _send(self, source: SourceTensor, send: Callable[[Piece], None], parts: list[int]) -> int:
        # One call for each tensor, so that its memory is let go before the next is read.
        index = self._manifest.positions[source.name]
        dtype = getattr(torch, self._manifest.tensors[index].dtype)
        value = source.read().detach().to(device="cpu", dtype=dtype).contiguous()
        parts[index] = digests.digest_tensor(value)
        return self._cut(index, value, send)

    def _cut(self, index: int, value: torch.Tensor, send: Callable[[Piece], None]) -> int:
        """Send a contiguous tensor in host memory, whole. Returns its bytes."""
        raw = value.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), self._max_chunk_bytes):
            send(Chunk(index, start, bytes(raw[start : start + self._max_chunk_bytes])))
        return len(raw)

    def close(self) -> None:
        pass
