"""CuPy's NVRTC kernels over torch's memory, on torch's stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

THREADS = 256
_HERE = Path(__file__).parent


@functools.cache
def kernel(name: str, **macros: str | int) -> Any:
    """The kernel `name` of the file `name`.cu. Compiled once for each device, and kept on disk by CuPy."""
    import cupy

    code = "".join((_HERE / file).read_text() for file in ("digest.cuh", f"{name}.cu")).replace(
        "#pragma once", ""
    )
    options = ("--std=c++17", *(f"-D{macro}={value}" for macro, value in macros.items()))
    return cupy.RawKernel(code, name, options)


def launch(function: Any, blocks: int, device: torch.device, *arguments: torch.Tensor | int) -> None:
    """Run `function` on torch's current stream of `device`. Tensors are passed as their addresses."""
    import cupy

    values = [np.uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else np.int32(a) for a in arguments]
    with cupy.cuda.Device(device.index), _stream(torch.cuda.current_stream(device)):
        function((blocks,), (THREADS,), tuple(values))


@functools.cache
def _stream(stream: torch.cuda.Stream) -> Any:
    """A stream of torch's, as CuPy takes it. Torch has a few, and ends none."""
    import cupy

    adopt = getattr(cupy.cuda.Stream, "from_external", None)  # CuPy 14's
    if adopt is not None:
        return adopt(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)


def table(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of unsigned 64-bit numbers in the device's memory."""
    return torch.from_numpy(np.array(rows, np.uint64).view(np.int64)).to(device)
