"""How changes are cut and laid out: sides of different builds rely on the number that names it."""

from __future__ import annotations

import hashlib

import torch

from weight_transfer.arena import Arena
from weight_transfer.manifest import TensorSpec
from weight_transfer.patches import find
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.tiles import LAYOUT, finer, tilings
from weight_transfer.windows import MIRROR_BYTES, windows

#: What belongs to each layout. Never change an entry: whatever makes another one raises LAYOUT.
KNOWN = {1: "bc56b2fe6b77591dfba89f88e6b3123005c89231fbe6b84ed5012479db599421"}
SHAPES = [(151936, 2560), (2560, 4096), (4096,), (9728, 2560), (2560,), (2560, 9728)] * 12


def placed(shapes: list[tuple[int, ...]]) -> list[Placement]:
    found, offset = [], 0
    for i, shape in enumerate(shapes):
        spec, strides = TensorSpec(f"t{i}", "bfloat16", shape), contiguous_strides(shape)
        found.append(Placement(spec, (Block(0, offset, strides, 0, strides, shape),)))
        offset += -(-spec.nbytes // 256) * 256
    return found


def test_a_layout_is_what_its_number_says() -> None:
    known = hashlib.sha256()
    large = placed(SHAPES)
    cut = finer(list(windows(large, MIRROR_BYTES)), large)
    for tiling in tilings(cut, large):
        rooms = [tiling.room(last) for last in (None, 0, 1000, tiling.most + 1)]
        known.update(repr((tiling, tiling.most, rooms, [tiling.words(room) for room in rooms])).encode())

    small = placed([(700, 64), (33,)])
    now, base = (Arena.create("layout", 1 << 17) for _ in range(2))
    bits = now.tensor(0, (1 << 16,), torch.int16)
    bits.copy_(torch.arange(1 << 16).to(torch.int16))
    base.tensor(0, (1 << 16,), torch.int16).copy_(bits)
    bits[5:40_000:7] ^= 3
    (window,) = windows(small, MIRROR_BYTES)
    (tiling,) = tilings([window], small)
    message = torch.zeros(tiling.words(10_000), dtype=torch.int32)
    sums = torch.zeros(2, dtype=torch.int64)
    find(tiling, [now], [base])(torch.tensor([10_000]), sums, message)
    known.update(message.numpy().tobytes() + sums.numpy().tobytes())
    assert known.hexdigest() == KNOWN[LAYOUT]
