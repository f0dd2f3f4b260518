"""What changed in a window, as it travels by NCCL: which bytes are compared, and how the changes are laid out.

A window's tensors are cut into tiles of `TILE_BYTES`, in one order on both sides. Its message is, in words of 32 bits:

    HEADER words, of which the first is how many units changed
    for each tile, where its entries begin behind the table, and how many they are
    entries, each `unit of its tile << 16 | the unit's bits`, those of a tile together and in no order

A unit is 16 bits of memory, whatever the dtype: bits count, and not values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weight_transfer.digest import WORD
from weight_transfer.manifest import ITEMSIZE
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.windows import Window, windows

LAYOUT = 1
"""The number of all this, which both sides must have alike: of what is above, and of how `finer` cuts."""
TILE_BYTES = 1 << 15
"""A block of threads holds as much in its registers, and numbers the units in 14 bits."""
UNIT = 2
HEADER = 4
ENTRY = 4
BREAK_EVEN = 0.25
"""The share of a window's units from which on it travels whole. An entry is two units' bytes, so that bytes break even
at one half; there changes would cost the time to find and to place them besides."""
STAGED_BREAK_EVEN = 0.125
"""The same where an update is staged. Changes are placed one by one while generation is stopped, and a whole window is
not: from here on what that costs the engine is more than what the trainer gains. docs/gpu.md has the figures."""
CHANGES_BYTES = 1 << 30
"""Of a window of which changes travel. Each costs some tenths of a millisecond of either host's time, whatever it has.
At worst three messages are in memory at once, each half as large."""
_LAST_BYTES = 64 << 20
_FIRST = 1 / 32
_SLACK, _AT_LEAST = 1.5, 1 << 10


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor that lie together in their arena, and in the tensor.

    first_word: of the tensor's digest, in the first of these bytes. tensor: its index in the manifest.
    """

    arena: int
    offset: int
    nbytes: int
    first_word: int
    tensor: int

    @property
    def tiles(self) -> int:
        return -(-self.nbytes // TILE_BYTES)


@dataclass(frozen=True)
class Tiling:
    """The pieces of one window."""

    pieces: tuple[Piece, ...]

    @property
    def tiles(self) -> int:
        return sum(piece.tiles for piece in self.pieces)

    @property
    def units(self) -> int:
        return sum(piece.nbytes for piece in self.pieces) // UNIT

    @property
    def most(self) -> int:
        """Entries beyond which the window travels whole."""
        return math.floor(self.units * BREAK_EVEN)

    def room(self, last: int | None, break_even: float = BREAK_EVEN) -> int:
        """For how many entries the next message shall have room, after one update with `last`, or none before.

        What does not fit makes the window travel whole, and room that is not needed travels too. `break_even` is the
        share of the units from which on it shall.
        """
        most = min(self.most, math.floor(self.units * break_even))
        if last is not None and last > most:
            return 0
        wanted = self.units * _FIRST if last is None else last * _SLACK + _AT_LEAST
        return min(most, math.ceil(wanted))

    def words(self, room: int) -> int:
        """Of a message with room for so many entries."""
        return HEADER + 2 * self.tiles + room


def finer(cut: Sequence[Window], placements: Sequence[Placement]) -> list[Window]:
    """Windows of which changes travel, of those in which all of `placements` does: in the same order, smaller ones.

    The last ones are smaller still: little is left to place once all is there.
    """
    found = []
    for window in cut:
        mine = [placements[i] for i in window.tensors]
        last = _LAST_BYTES if window is cut[-1] else CHANGES_BYTES
        for part in windows(mine, CHANGES_BYTES, last=last):
            found.append(Window(tuple(window.tensors[i] for i in part.tensors), part.runs))
    return found


def tilings(cut: Sequence[Window], placements: Sequence[Placement]) -> list[Tiling]:
    """Of each of `windows(placements)`, or `finer` ones. Raises as `tiling` does."""
    return [tiling(window, placements) for window in cut]


def tiling(window: Window, placements: Sequence[Placement]) -> Tiling:
    """Of one window of some that `placements` are cut into.

    Raises:
        ValueError: a tensor does not lie so that changes can be told; names it.
    """
    found = Tiling(tuple(piece for i in window.tensors for piece in _pieces(i, placements[i])))
    if found.units >= 1 << 32:
        raise ValueError(f"{placements[window.tensors[0]].spec.name}: is too large for changes to be told")
    return found


def _pieces(tensor: int, placement: Placement) -> list[Piece]:
    spec, size = placement.spec, ITEMSIZE[placement.spec.dtype]
    blocks = [block for block in placement.blocks if block.numel]
    if sum(block.numel for block in blocks) != spec.numel:
        raise ValueError(f"{spec.name}: the engine holds parts of it more than once")
    found = []
    for block in blocks:
        first, nbytes = block.tensor_offset * size, block.numel * size
        ends = first + nbytes == spec.nbytes
        if not _together(block) or first % WORD or (nbytes % WORD and not ends):
            raise ValueError(f"{spec.name}: the engine holds it in parts that are no ranges of it")
        if nbytes % UNIT or block.arena_offset % UNIT:
            raise ValueError(f"{spec.name}: its {spec.dtype} are no units of 16 bits")
        found.append(Piece(block.arena, block.arena_offset, nbytes, first // WORD, tensor))
    return found


def _together(block: Block) -> bool:
    """Whether the block is one range of its tensor, and of its arena."""
    lengths = [n for n in block.shape if n != 1]
    dense = contiguous_strides(lengths)
    return all(
        tuple(s for n, s in zip(block.shape, strides, strict=True) if n != 1) == dense
        for strides in (block.tensor_strides, block.arena_strides)
    )
