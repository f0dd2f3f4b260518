"""Finding what changed in a window, and placing it: in host memory here, on a CUDA device by its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from weight_transfer import digest as digests
from weight_transfer.arena import Arena
from weight_transfer.tiles import HEADER, TILE_BYTES, UNIT, Piece, Tiling

_UNITS = TILE_BYTES // UNIT


class Find(Protocol):
    """Compares a window's bytes with the base, renews the base, and digests: one pass over the memory."""

    def __call__(self, room: torch.Tensor, sums: torch.Tensor, message: torch.Tensor) -> None:
        """In the order of the device's current stream.

        Args:
            room: int64, of which the first is for how many entries the message has room. Those of a window with more
                changes are incomplete; how many there are is always told, and the base renewed.
            sums: int64, one for each tensor of the manifest: the digest sums of the window's are added.
            message: int32, as `tiles` has it. The header's words must be zero.
        """


class Patch(Protocol):
    """Takes a window's message. Of one that has not room for all its changes nothing is taken."""

    def __call__(
        self, room: torch.Tensor, sums: torch.Tensor | None, message: torch.Tensor, *, write: bool
    ) -> None:
        """In the order of the device's current stream.

        Args:
            room: as for `Find`.
            sums: as for `Find`: of the window as the message makes it. None where they are not wanted.
            message: comes from another process. Whatever it says, nothing outside the window is read or written.
            write: whether to write the changes; else the window stays as it is.
        """


def find(tiling: Tiling, now: Sequence[Arena], base: Sequence[Arena]) -> Find:
    """Of bytes in `now` against those at the same places in `base`."""
    if now[0].device.type == "cuda":
        from weight_transfer.cuda.patches import FindOnDevice

        return FindOnDevice(tiling, now, base)
    return _FindInHost(tiling, now, base)


def patch(tiling: Tiling, arenas: Sequence[Arena]) -> Patch:
    """Of bytes in these arenas."""
    if arenas[0].device.type == "cuda":
        from weight_transfer.cuda.patches import PatchOnDevice

        return PatchOnDevice(tiling, arenas)
    return _PatchInHost(tiling, arenas)


class _FindInHost:
    def __init__(self, tiling: Tiling, now: Sequence[Arena], base: Sequence[Arena]) -> None:
        self._parts = [(piece, _units(piece, now), _units(piece, base)) for piece in tiling.pieces]

    def __call__(self, room: torch.Tensor, sums: torch.Tensor, message: torch.Tensor) -> None:
        table, entries = _split(message, [piece for piece, _, _ in self._parts])
        found = first = 0
        for piece, now, base in self._parts:
            where = np.flatnonzero(now != base)
            counts = np.bincount(where // _UNITS, minlength=piece.tiles)
            rows = table[first : first + piece.tiles]
            rows[:, 0], rows[:, 1] = found + np.cumsum(counts) - counts, counts
            base[where] = now[where]
            if found + len(where) <= int(room[0]):
                entries[found : found + len(where)] = where % _UNITS << 16 | now[where]
            found, first = found + len(where), first + piece.tiles
            _add(sums, piece, now)
        message[:1].copy_(torch.tensor([found]).to(torch.int32))


class _PatchInHost:
    def __init__(self, tiling: Tiling, arenas: Sequence[Arena]) -> None:
        self._parts = [(piece, _units(piece, arenas)) for piece in tiling.pieces]

    def __call__(
        self, room: torch.Tensor, sums: torch.Tensor | None, message: torch.Tensor, *, write: bool
    ) -> None:
        if int(message[0]) & 0xFFFFFFFF > int(room[0]):
            return
        table, entries = _split(message, [piece for piece, _ in self._parts])
        first = 0
        for piece, live in self._parts:
            rows = table[first : first + piece.tiles].astype(np.int64)
            first += piece.tiles
            starts, counts = rows[:, 0], np.where(rows.sum(1) > int(room[0]), 0, rows[:, 1])
            tile = np.repeat(np.arange(piece.tiles), counts)
            within = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
            mine = entries[starts[tile] + within]
            offset, at = mine >> 16, tile * _UNITS + (mine >> 16)
            inside = (offset < _UNITS) & (at < len(live))
            place = live if write else live.copy()
            place[at[inside]] = (mine & 0xFFFF).astype(np.uint16)[inside]
            if sums is not None:
                _add(sums, piece, place)


def _units(piece: Piece, arenas: Sequence[Arena]) -> np.ndarray[Any, Any]:
    """The piece's memory as units."""
    units: np.ndarray[Any, Any] = (
        arenas[piece.arena].tensor(piece.offset, (piece.nbytes // UNIT,), torch.int16).numpy()
    )
    return units.view(np.uint16)


def _split(
    message: torch.Tensor, pieces: Sequence[Piece]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The table of a message, and its entries."""
    words = message.numpy().view(np.uint32)
    end = HEADER + 2 * sum(piece.tiles for piece in pieces)
    return words[HEADER:end].reshape(-1, 2), words[end:]


def _add(sums: torch.Tensor, piece: Piece, units: np.ndarray[Any, Any]) -> None:
    part = digests.partial(units.ctypes.data, units.nbytes, piece.first_word)
    total = (int(sums[piece.tensor]) + part) % 2**64
    sums[piece.tensor] = total - (total >> 63 << 64)
