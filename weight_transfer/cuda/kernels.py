"""CuPy's NVRTC kernels over torch's memory, on torch's stream."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

THREADS = 256
_HERE = Path(__file__).parent


def source(name: str) -> str:
    """The source of the kernel `name`, in one text."""
    files = ("digest.cuh", "sum.cuh", "cast.cuh", "tile.cuh", f"{name}.cu")
    return "".join((_HERE / file).read_text() for file in files).replace("#pragma once", "")


@functools.cache
def kernel(name: str, **macros: str | int) -> Any:
    """The kernel `name` of the file `name`.cu. Compiled once for each device, and kept on disk by CuPy."""
    import cupy

    macros |= {"THREADS": THREADS}
    options = ("--std=c++17", *(f"-D{macro}={value}" for macro, value in macros.items()))
    return cupy.RawKernel(source(name), name, options)


def launch(function: Any, blocks: int, device: torch.device, *arguments: torch.Tensor) -> None:
    """Run `function` on torch's current stream of `device`. Tensors are passed as their addresses."""
    import cupy

    values = tuple(np.uint64(a.data_ptr()) for a in arguments)
    with cupy.cuda.Device(device.index), _stream(torch.cuda.current_stream(device)):
        function((blocks,), (THREADS,), values)


def owners(counts: Any, device: torch.device) -> torch.Tensor:
    """For each block, whose it is, where the first `counts[0]` are the first's, and so on: int32, in the device's
    memory."""
    return torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int32), counts)).to(device)


@functools.cache
def _stream(stream: torch.cuda.Stream) -> Any:
    """A stream of torch's, as CuPy takes it. Torch has a few, and ends none."""
    import cupy

    adopt = getattr(cupy.cuda.Stream, "from_external", None)  # CuPy 14's
    if adopt is not None:
        return adopt(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)


def table(rows: Any, device: torch.device) -> torch.Tensor:
    """Rows of unsigned 64-bit numbers in the device's memory."""
    return torch.from_numpy(np.asarray(rows, np.uint64).view(np.int64)).to(device)
