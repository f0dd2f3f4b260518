"""CUDA devices by their UUIDs: indices differ from process to process, by CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import importlib.util

import torch


def uuid_of(device: torch.device) -> str:
    """The UUID of a CUDA device, as nvidia-smi prints it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def device_of(uuid: str) -> torch.device:
    """The CUDA device with this UUID.

    Raises:
        ValueError: this process sees none, with those that it sees.
    """
    seen = {uuid_of(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    if uuid not in seen:
        raise ValueError(f"this process does not see {uuid}, only {', '.join(seen) or 'no GPU'}")
    return torch.device("cuda", seen[uuid])


def require_kernels() -> None:
    """Raise ImportError where what compiles the kernels is not installed."""
    if importlib.util.find_spec("cupy") is None:
        raise ImportError("weights on a GPU need CuPy, which is not installed: the extra `cuda` brings it")
