"""The CUDA kernels without a device: their source compiled as C++, each thread of each block in turn.

Warps, shared memory and the casts' instructions have stand-ins here; tests/gpu runs the real ones.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from weight_transfer.cuda import kernels

STAND_INS = """
#include <bit>
#include <cstdint>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct Dim { unsigned x; };
static Dim blockIdx, threadIdx;
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
"""
SUM = "static void add_up(u64 sum, u64* total) { *total += sum; }\n"
CASTS = """
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
inline float widen(unsigned both, bool high, bf16) { return __uint_as_float(high ? both & 0xffff0000u : both << 16); }
inline float widen(unsigned both, bool high, f16) {
    return float(std::bit_cast<_Float16>((unsigned short)(high ? both >> 16 : both & 0xffff)));
}
inline unsigned short half(float v, bf16) {
    const unsigned bits = __float_as_uint(v);
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
inline unsigned short half(float v, f16) { return std::bit_cast<unsigned short>((_Float16)v); }
template <typename To>
unsigned narrow(float low, float high, To to) { return half(low, to) | unsigned(half(high, to)) << 16; }
"""
RUN = """
extern "C" void run(unsigned blocks, const void* table, const int* owners, unsigned long long* sums) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
            KERNEL((decltype(first(KERNEL)))table, owners, sums);
}
"""
FIRST = "template <typename T> T first(void (*)(T, const int*, u64*));\n"


def compiled(folder: Path, name: str, **macros: str) -> ctypes.CDLL:
    """The kernel `name`, built in `folder`."""
    parts = {"digest.cuh": None, "sum.cuh": SUM, "cast.cuh": CASTS, f"{name}.cu": None}
    here = Path(kernels.__file__).parent
    text = [STAND_INS, *(stand_in or (here / file).read_text() for file, stand_in in parts.items())]
    source = folder / "_".join([name, *map(str, macros.values())])
    source.with_suffix(".cpp").write_text("\n".join([*text, FIRST, RUN]))
    flags = [f"-D{macro}={value}" for macro, value in (macros | {"THREADS": "256", "KERNEL": name}).items()]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-w", *flags]
    subprocess.run([*command, "-o", f"{source}.so", str(source.with_suffix(".cpp"))], check=True, timeout=120)
    return ctypes.CDLL(f"{source}.so")


def run(
    library: ctypes.CDLL, blocks: int, table: torch.Tensor, owners: torch.Tensor, sums: torch.Tensor
) -> None:
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, owners, sums))
    library.run(ctypes.c_uint(blocks), *addresses)


def host_launch(library: ctypes.CDLL) -> Callable[..., None]:
    """`kernels.launch`, here."""
    return lambda _, blocks, device, *tensors: run(library, blocks, *tensors)
