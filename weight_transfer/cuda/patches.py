"""`weight_transfer.patches` on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from weight_transfer.arena import Arena
from weight_transfer.cuda import kernels
from weight_transfer.tiles import HEADER, TILE_BYTES, Tiling


class _Pieces:
    """A window's pieces as the kernels take them: a block of threads for each tile."""

    def __init__(self, tiling: Tiling, now: Sequence[Arena], base: Sequence[Arena]) -> None:
        counts = np.array([piece.tiles for piece in tiling.pieces], np.int64)
        firsts = np.cumsum(counts) - counts
        rows = [
            [
                now[p.arena].address + p.offset,
                base[p.arena].address + p.offset,
                p.nbytes,
                p.first_word,
                p.tensor,
            ]
            for p in tiling.pieces
        ]
        self.device = now[0].device
        self.tiles = tiling.tiles
        self.arenas = [*now, *base]  # whose memory is held
        self.table = kernels.table(
            [[*row, first] for row, first in zip(rows, firsts, strict=True)], self.device
        )
        self.owners = kernels.owners(counts, self.device)

    def launch(self, name: str, *arguments: torch.Tensor, **macros: int) -> None:
        kernel = kernels.kernel(name, TILE_BYTES=f"{TILE_BYTES}u", HEADER=HEADER, **macros)
        kernels.launch(kernel, self.tiles, self.device, self.table, self.owners, *arguments)


class FindOnDevice:
    """See `patches.Find`."""

    def __init__(self, tiling: Tiling, now: Sequence[Arena], base: Sequence[Arena]) -> None:
        self._pieces = _Pieces(tiling, now, base)

    def __call__(self, room: torch.Tensor, sums: torch.Tensor, message: torch.Tensor) -> None:
        self._pieces.launch("find", room, sums, message)


class PatchOnDevice:
    """See `patches.Patch`."""

    def __init__(self, tiling: Tiling, arenas: Sequence[Arena]) -> None:
        self._pieces = _Pieces(tiling, arenas, arenas)

    def __call__(
        self, room: torch.Tensor, sums: torch.Tensor | None, message: torch.Tensor, *, write: bool
    ) -> None:
        wanted = room if sums is None else sums  # an address that is not looked at
        self._pieces.launch("patch", room, wanted, message, SUMS=int(sums is not None), WRITES=int(write))
