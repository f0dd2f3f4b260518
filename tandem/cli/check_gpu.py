"""Checks of the driver, the GPUs, and of what fits them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tandem.cli.findings import Finding, bad, dotted, installed, note, ok


def gpus() -> Iterator[Finding]:
    """The driver, the GPUs, and whether torch and NCCL fit them."""
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        if devices:
            yield bad(
                "gpu",
                f"{len(devices)} in /dev, but no libcuda.so.1",
                "install NVIDIA's driver, or run the container with --gpus all",
            )
        else:
            yield note("gpu", "none: models run on the CPU")
        return
    if code := cuda.cuInit(0):
        yield bad(
            "gpu", f"the driver answers cuInit with {code}", "look at nvidia-smi and dmesg; load or update it"
        )
        return
    count, number = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(number))
    driver = (number.value // 1000, number.value % 1000 // 10)
    if not count.value:
        yield bad("gpu", "the driver sees none", "look at CUDA_VISIBLE_DEVICES")
        return
    yield ok("gpu", f"{count.value}, driver for CUDA {dotted(driver)}")
    torch = installed("torch") or ""
    local = torch.partition("+")[2]
    if local == "cpu":
        yield bad("torch's CUDA", f"torch {torch} has none", "install torch's build for CUDA")
    elif local.startswith("cu") and local[2:].isdecimal():
        needs = (int(local[2:-1]), int(local[-1]))
        if needs[0] > driver[0]:
            yield bad("torch's CUDA", f"torch {torch} is for CUDA {dotted(needs)}", "update the driver")
        else:
            yield ok("torch's CUDA", dotted(needs))
    if find_spec("cupy") is None:
        yield bad("cupy", "not installed: weights on a GPU cannot be written", "pip install tandem[cuda]")
    else:
        yield ok("cupy", "installed")
    yield _nccl(count.value)


def _nccl(count: int) -> Finding:
    spec = find_spec("nvidia")
    folders = (
        [Path(folder, "nccl", "lib") for folder in (spec.submodule_search_locations or ())] if spec else []
    )
    for name in [*(str(folder / "libnccl.so.2") for folder in folders), "libnccl.so.2"]:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        number = ctypes.c_int()
        library.ncclGetVersion(ctypes.byref(number))
        major, rest = divmod(number.value, 10000)
        return ok("nccl", f"{major}.{rest // 100}.{rest % 100}")
    make = bad if count > 1 else note
    return make(
        "nccl", "libnccl.so.2 is not found: weights cannot go to another GPU", "pip install nvidia-nccl-cu13"
    )
