"""What changed in a window is found and placed to the bit: in host memory, and by the kernels' own source.

The kernels are compiled as C++ here. Each thread of a block is a fiber that stops at barriers and shuffles, so that
they exchange what they would on a device; tests/gpu runs the real ones.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weight_transfer import patches
from weight_transfer import tiles as tiles_module
from weight_transfer.arena import Arena
from weight_transfer.cuda import kernels
from weight_transfer.cuda import patches as on_device
from weight_transfer.digest import digest_tensor, finished
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.tiles import HEADER, TILE_BYTES, Tiling, tiling
from weight_transfer.windows import windows

FIBERS = r"""
#include <ucontext.h>
#include <cstdint>
#include <vector>
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Dim { unsigned x; };
static Dim blockIdx, gridDim, threadIdx, blockDim{THREADS};
namespace fibers {
static ucontext_t main_context, contexts[THREADS];
static std::vector<char> stacks[THREADS];
static bool over[THREADS];
static unsigned at_barrier[THREADS];
static unsigned long long slots[THREADS];
static void (*body)();
inline void yield() {
    const unsigned me = threadIdx.x;
    swapcontext(&contexts[me], &main_context);
    threadIdx.x = me;
}
static void enter() { body(); over[threadIdx.x] = true; }
inline void run_block() {
    for (unsigned i = 0; i < THREADS; ++i) {
        stacks[i].resize(1 << 16);
        over[i] = false, at_barrier[i] = 0;
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks[i].data();
        contexts[i].uc_stack.ss_size = stacks[i].size();
        contexts[i].uc_link = &main_context;
        makecontext(&contexts[i], enter, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned i = 0; i < THREADS; ++i) {
            if (over[i]) continue;
            alive = true;
            threadIdx.x = i;
            swapcontext(&main_context, &contexts[i]);
        }
    }
}
}  // namespace fibers
// A thread that has left is waited for by nobody.
inline void __syncthreads() {
    const unsigned turn = ++fibers::at_barrier[threadIdx.x];
    for (bool all = false; !all;) {
        fibers::yield();
        all = true;
        for (unsigned i = 0; i < THREADS; ++i) all &= fibers::over[i] || fibers::at_barrier[i] >= turn;
    }
}
// The threads of a warp are resumed one after the other, and come here together.
template <typename T>
T exchanged(T value, int lane) {
    const unsigned warp = threadIdx.x & ~31u;
    fibers::slots[threadIdx.x] = value;
    fibers::yield();
    const T found = lane < 0 || lane > 31 ? value : T(fibers::slots[warp + lane]);
    fibers::yield();
    return found;
}
template <typename T> T __shfl_up_sync(unsigned, T v, int n) { return exchanged(v, int(threadIdx.x & 31) - n); }
template <typename T> T __shfl_down_sync(unsigned, T v, int n) { return exchanged(v, int(threadIdx.x & 31) + n); }
template <typename T> T __shfl_sync(unsigned, T v, int lane) { return exchanged(v, lane); }
template <typename T> T atomicAdd(T* at, T value) { const T before = *at; *at += value; return before; }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
"""
RUN = r"""
static const void* arguments[5];
static void call() {
    KERNEL((const Piece*)arguments[0], (const int*)arguments[1], (const u64*)arguments[2], (u64*)arguments[3],
           (unsigned*)arguments[4]);
}
extern "C" void run(unsigned blocks, const void* a, const void* b, const void* c, const void* d, const void* e) {
    const void* given[] = {a, b, c, d, e};
    for (int i = 0; i < 5; ++i) arguments[i] = given[i];
    fibers::body = call;
    gridDim.x = blocks;
    // Blocks come in any order on a device.
    for (unsigned i = 0; i < blocks; ++i) {
        blockIdx.x = blocks % 7 ? i * 7 % blocks : i;
        fibers::run_block();
    }
}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    folder, built = tmp_path_factory.mktemp("kernels"), {}

    def compiled(name: str, **macros: str | int) -> ctypes.CDLL:
        key = "_".join([name, *map(str, macros.values())])
        if key not in built:
            here = Path(kernels.__file__).parent
            files = ("digest.cuh", "sum.cuh", "tile.cuh", f"{name}.cu")
            text = [FIBERS, *((here / file).read_text() for file in files), RUN]
            path = folder / f"{key}.cpp"
            path.write_text("\n".join(text))
            flags = [f"-D{m}={v}" for m, v in (macros | {"THREADS": kernels.THREADS, "KERNEL": name}).items()]
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-w", *flags]
            subprocess.run([*command, "-o", f"{path}.so", str(path)], check=True, timeout=120)
            built[key] = ctypes.CDLL(f"{path}.so")
        return built[key]

    return compiled


@pytest.fixture(params=["host", "kernels"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """`find` and `patch`, of both kinds."""
    if request.param == "host":
        return patches.find, patches.patch
    source = request.getfixturevalue("source")
    monkeypatch.setattr(kernels, "kernel", lambda name, **macros: source(name, **macros))

    def launch(library: ctypes.CDLL, blocks: int, device: object, *tensors: torch.Tensor) -> None:
        library.run(ctypes.c_uint(blocks), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))

    monkeypatch.setattr(kernels, "launch", launch)
    return on_device.FindOnDevice, on_device.PatchOnDevice


def placed(i: int, dtype: str, n: int, at: int) -> Placement:
    return Placement(TensorSpec(f"{i}", dtype, (n,)), (Block(0, at, (1,), 0, (1,), (n,)),))


#: (dtype, elements, byte): aligned and not, a tile and a bit, ends that are no word's, two that touch.
TENSORS = [
    ("bfloat16", 3 * TILE_BYTES // 2 + 5, 0),
    ("float32", 4099, 3 * TILE_BYTES + 10 + 2),
    ("bfloat16", 1, 3 * TILE_BYTES + 12 + 4 * 4099),
    ("float16", TILE_BYTES // 2, 6 * TILE_BYTES),
    ("bfloat16", 17, 7 * TILE_BYTES + 6),
    ("float64", 33, 7 * TILE_BYTES + 1024),
    ("float16", TILE_BYTES, 8 * TILE_BYTES + 2),
]
SIZE = 16 * TILE_BYTES


class Place:
    """Some tensors in memory of their own."""

    def __init__(self, raw: torch.Tensor) -> None:
        self.arena = Arena.create("test", SIZE)
        self.raw = self.arena.tensor(0, (SIZE,), torch.uint8)
        self.raw.copy_(raw)

    def digests(self, placements: list[Placement]) -> list[int]:
        return [digest_tensor(p.view([self.arena])) for p in placements]


def policy() -> tuple[list[Placement], Tiling]:
    placements = [placed(i, *tensor) for i, tensor in enumerate(TENSORS)]
    (window,) = windows(placements)
    return placements, tiling(window, placements)


def told(sums: torch.Tensor, placements: list[Placement]) -> list[int]:
    return finished(sums.numpy(), np.array([p.spec.nbytes for p in placements], np.uint64))


def message_of(tiles: Tiling, room: int) -> torch.Tensor:
    message = torch.full((tiles.words(room) + 8,), 0x5A5A5A5A, dtype=torch.int32)
    message[:HEADER] = 0
    return message


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 1.0])
def test_what_changed_is_found_and_placed_to_the_bit(made: tuple[Any, Any], share: float) -> None:
    find, patch = made
    placements, tiles = policy()
    generator = torch.Generator().manual_seed(int(share * 1e4))
    before = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator)
    after = before.clone().view(torch.int16)
    changed = torch.rand(len(after), generator=generator) < share
    after[changed] ^= torch.randint(1, 1 << 15, after.shape, generator=generator).to(torch.int16)[changed]
    after = after.view(torch.uint8)
    now, base = Place(after), Place(before)
    engine, stage = Place(before), Place(before)
    mine = torch.zeros(SIZE, dtype=torch.bool)  # what is a tensor's, and no other byte
    for p in placements:
        mine[p.blocks[0].arena_offset :][: p.spec.nbytes] = True
    want = torch.where(mine, after, before)
    count = int((changed & mine.view(-1, 2)[:, 0]).sum())

    room, message = torch.tensor([count]), message_of(tiles, count)
    sums = torch.zeros(len(placements), dtype=torch.int64)
    find(tiles, [now.arena], [base.arena])(room, sums, message)
    assert int(message[0]) == count
    assert (message[tiles.words(count) :] == 0x5A5A5A5A).all(), "nothing behind the message"
    assert torch.equal(now.raw, after)
    assert torch.equal(base.raw, want)
    assert told(sums, placements) == now.digests(placements)

    sums.zero_()
    patch(tiles, [stage.arena])(room, sums, message, write=False)
    assert told(sums, placements) == now.digests(placements)
    assert torch.equal(stage.raw, before)
    patch(tiles, [stage.arena])(room, None, message, write=True)
    assert torch.equal(stage.raw, want)
    sums.zero_()
    patch(tiles, [engine.arena])(room, sums, message, write=True)
    assert told(sums, placements) == now.digests(placements)
    assert torch.equal(engine.raw, want)


def test_bits_count_and_not_values(made: tuple[Any, Any]) -> None:
    find, patch = made
    placements, tiles = policy()
    now, base, engine = (Place(torch.zeros(SIZE, dtype=torch.uint8)) for _ in range(3))
    first = placements[0].view([now.arena]).view(torch.int16)
    first[3] = -0x8000  # -0.0, where 0.0 was
    first[4] = 0x7FC1  # NaNs with two payloads
    placements[0].view([base.arena]).view(torch.int16)[4:6] = 0x7FC0
    first[5] = 0x7FC0
    placements[0].view([engine.arena]).view(torch.int16)[4:6] = 0x7FC0
    room, message = torch.tensor([8]), message_of(tiles, 8)
    sums = torch.zeros(len(placements), dtype=torch.int64)
    find(tiles, [now.arena], [base.arena])(room, sums, message)
    assert int(message[0]) == 2
    patch(tiles, [engine.arena])(room, None, message, write=True)
    assert torch.equal(engine.raw, now.raw)


def test_a_window_without_room_for_its_changes_is_not_written(made: tuple[Any, Any]) -> None:
    find, patch = made
    placements, tiles = policy()
    before, after = (torch.randint(0, 256, (SIZE,), dtype=torch.uint8) for _ in range(2))
    now, base, engine = Place(after), Place(before), Place(before)
    room, message = torch.tensor([100]), message_of(tiles, 100)
    sums = torch.zeros(len(placements), dtype=torch.int64)
    find(tiles, [now.arena], [base.arena])(room, sums, message)
    assert int(message[0]) > 100
    assert (message[tiles.words(100) :] == 0x5A5A5A5A).all()
    assert base.digests(placements) == now.digests(placements) == told(sums, placements)
    sums.zero_()
    patch(tiles, [engine.arena])(room, sums, message, write=True)
    assert not sums.any()
    assert torch.equal(engine.raw, before)


def test_a_message_that_is_none_writes_nothing_outside_its_window(made: tuple[Any, Any]) -> None:
    _, patch = made
    placements, tiles = policy()
    mine = torch.zeros(SIZE, dtype=torch.bool)
    for p in placements:
        mine[p.blocks[0].arena_offset :][: p.spec.nbytes] = True
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        message = torch.randint(-(2**31), 2**31 - 1, (tiles.words(1000),), generator=generator).to(
            torch.int32
        )
        if seed % 2:  # entries that are read, for tiles and units that are not there
            message[HEADER : HEADER + 2 * tiles.tiles] = torch.randint(
                0, 500, (2 * tiles.tiles,), generator=generator
            ).to(torch.int32)
        message[0] = 900
        engine = Place(torch.zeros(SIZE, dtype=torch.uint8))
        sums = torch.zeros(len(placements), dtype=torch.int64)
        patch(tiles, [engine.arena])(torch.tensor([1000]), sums, message, write=True)
        assert not engine.raw[~mine].any()
        assert told(sums, placements) == engine.digests(placements), "of what is there now"


def blocks(*parts: tuple[int, tuple[int, ...], tuple[int, ...], int]) -> tuple[Block, ...]:
    return tuple(
        Block(0, at, contiguous_strides(shape), first, strides, shape) for at, shape, strides, first in parts
    )


def test_a_tensor_in_two_ranges_is_digested_as_one(made: tuple[Any, Any]) -> None:
    find, _ = made
    spec = TensorSpec("w", "bfloat16", (8, 6))
    split = Placement(spec, blocks((0, (4, 6), (6, 1), 0), (512, (4, 6), (6, 1), 24)))
    (window,) = windows([split])
    tiles = tiling(window, [split])
    now, base = (Place(torch.randint(0, 256, (SIZE,), dtype=torch.uint8)) for _ in range(2))
    sums = torch.zeros(1, dtype=torch.int64)
    find(tiles, [now.arena], [base.arena])(torch.tensor([48]), sums, message_of(tiles, 48))
    assert told(sums, [split]) == [digest_tensor(split.gather([now.arena]))]


@pytest.mark.parametrize(
    ("dtype", "shape", "parts", "why"),
    [
        ("bfloat16", (4, 6), [(0, (4, 3), (6, 1), 0), (64, (4, 3), (6, 1), 3)], "parts that are no ranges"),
        ("bfloat16", (2, 3), [(0, (1, 3), (3, 1), 0), (64, (1, 3), (3, 1), 3)], "parts that are no ranges"),
        ("bfloat16", (4,), [(0, (4,), (1,), 0), (64, (4,), (1,), 0)], "more than once"),
        ("uint8", (3,), [(0, (3,), (1,), 0)], "no units of 16 bits"),
    ],
)
def test_what_cannot_be_told_is_named(dtype: str, shape: tuple[int, ...], parts: Any, why: str) -> None:
    placement = Placement(TensorSpec("w", dtype, shape), blocks(*parts))
    (window,) = windows([placement])
    with pytest.raises(ValueError, match=f"w: .*{why}"):
        tiling(window, [placement])


def test_changes_travel_in_finer_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "CHANGES_BYTES", 300)
    monkeypatch.setattr(tiles_module, "_LAST_BYTES", 100)
    placements = [placed(i, "bfloat16", 50, 128 * (11 - i)) for i in range(12)]
    cut = windows(placements, 600, last=600)
    assert [len(window.tensors) for window in cut] == [6, 6]
    found = tiles_module.finer(cut, placements)
    assert [window.tensors for window in found] == [
        (11, 10, 9), (8, 7, 6), (5, 4, 3), (2, 1), (0,)
    ]  # fmt: skip
    assert [run for window in found for run in window.runs] == [run for window in cut for run in window.runs]


def test_room_follows_what_came_last() -> None:
    _, tiles = policy()
    assert tiles.room(None) == -(-tiles.units // 32)
    assert 0 < tiles.room(0) <= 1024
    assert tiles.room(1000) == 1000 * 1.5 + 1024
    assert tiles.room(tiles.most) == tiles.most
    assert tiles.room(tiles.most + 1) == 0, "it travels whole, and is still looked at"
    assert tiles.room(tiles.units // 10, 0.125) == tiles.units // 8
    assert tiles.room(tiles.units // 8 + 1, 0.125) == 0
