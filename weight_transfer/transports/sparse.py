"""Sparse: a stream of what changed since the last commit, and of everything where that cannot be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weight_transfer import digest as digests
from weight_transfer.manifest import Manifest
from weight_transfer.sparse import Changes, bits, changed, pack
from weight_transfer.transports.base import Moved, Piece, SourceTensor
from weight_transfer.transports.stream import StreamTransport

#: A tensor of which more than this share changed travels whole: over a Unix socket that is quicker then, as measured.
BREAK_EVEN = 0.15


class SparseTransport(StreamTransport):
    """Keeps a copy of what the engine has committed, in the engine's dtypes, where the policy is.

    That copy is all the memory it takes, beside the changes of one tensor. It is not trusted after an update that
    failed: the next one is whole, as the first is.
    """

    def __init__(self, manifest: Manifest, max_chunk_bytes: int) -> None:
        super().__init__(manifest, max_chunk_bytes)
        self._held: dict[int, torch.Tensor] = {}
        self._committed = False  # what is held is what the engine has
        self._changed = 0

    @property
    def partial(self) -> bool:
        return self._committed

    def forget(self) -> None:
        self._committed = False

    def mark(self) -> None:
        self._committed = len(self._held) == len(self._manifest)

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        partial, self._changed = self._committed, 0
        self._committed = False  # until it is committed, what is held is what may be
        parts = [0] * len(self._manifest)
        step = self._send_changes if partial else self._send_whole
        moved = sum(step(source, send, parts) for source in policy)
        return Moved(moved, digests.combine(parts), self._changed if partial else None)

    def close(self) -> None:
        self._held.clear()
        self._committed = False

    def _read(self, source: SourceTensor, parts: list[int]) -> tuple[int, torch.Tensor]:
        index = self._manifest.positions[source.name]
        value = source.read().detach().to(getattr(torch, self._manifest.tensors[index].dtype)).contiguous()
        parts[index] = digests.digest_tensor(value)
        return index, value

    def _send_whole(self, source: SourceTensor, send: Callable[[Piece], None], parts: list[int]) -> int:
        index, value = self._read(source, parts)
        return self._cut_and_hold(index, value, send)

    def _send_changes(self, source: SourceTensor, send: Callable[[Piece], None], parts: list[int]) -> int:
        index, value = self._read(source, parts)
        held = self._held[index]
        if held.device != value.device:
            held = self._held[index] = held.to(value.device)
        now, before = bits(value), bits(held)
        where = changed(now, before)
        self._changed += len(where)
        if len(where) > BREAK_EVEN * len(now):
            return self._cut_and_hold(index, value, send)
        values = now.index_select(0, where)
        before.scatter_(0, where, values)
        moved = 0
        for piece in pack(Changes(index, where, values), self._max_chunk_bytes):
            send(piece)
            moved += len(piece.data)
        return moved

    def _cut_and_hold(self, index: int, value: torch.Tensor, send: Callable[[Piece], None]) -> int:
        moved = self._cut(index, value.cpu(), send)
        held = self._held.get(index)
        if held is None or held.device != value.device:
            self._held[index] = value.clone()
        else:
            held.copy_(value)
        return moved
