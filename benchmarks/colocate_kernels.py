"""The weight plane's kernels on a device, beside torch's batched copy and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.colocate_peers import config, timed
from benchmarks.measure import ROUNDS, WARM_UPS, percentiles
from weight_transfer.arena import Arena
from weight_transfer.digest import Digester
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.write import write


def kernels(size: str) -> dict[str, Any]:
    """Writing fp32 tensors into a bf16 arena, and digesting that."""
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(config(size))  # type: ignore[no-untyped-call]
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    manifest = Manifest(tuple(TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items()))
    arena = Arena.create("benchmark", manifest.offsets[-1], "cuda")
    items = []
    for spec, offset in zip(manifest, manifest.offsets, strict=False):
        strides = contiguous_strides(spec.shape)
        block = Block(0, offset, strides, 0, strides, spec.shape)
        items.append((Placement(spec, (block,)), torch.randn(spec.shape, device="cuda")))
    places, values = [place.view([arena]) for place, _ in items], [value for _, value in items]
    found: dict[str, Any] = {"bytes_bf16": manifest.nbytes}
    digester, look = Digester(places), Digester(places)
    found["write_fp32"] = rate(lambda: write(items, [arena]), 3 * manifest.nbytes)
    found["foreach_copy_fp32"] = rate(lambda: torch._foreach_copy_(places, values), 3 * manifest.nbytes)
    found["digest_bf16"] = rate(digester.digests, manifest.nbytes)
    found["digest_bf16"]["device_ms"] = events(look.look)
    largest = max(values, key=torch.Tensor.numel).view(-1)
    target = torch.empty_like(largest)
    found["device_copy"] = rate(lambda: target.copy_(largest), 2 * largest.nbytes)
    return found


def rate(call: Callable[[], Any], nbytes: int) -> dict[str, float]:
    """Milliseconds of a call, until the device is done, and GB/s of the bytes that it reads and writes.

    device_ms: those in which the device had work of it, by its own clock.
    """
    found = timed(call)
    device = events(call)
    return found | {
        "gb_s": nbytes / found["p50"] / 1e6,
        "device_ms": device,
        "device_gb_s": nbytes / device / 1e6,
    }


def events(call: Callable[[], Any]) -> float:
    """Milliseconds of the device's clock from before a call to after it, the median; a busy device hides what the
    host needs to begin."""
    took = []
    fill = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS + ROUNDS):
        torch.cuda.synchronize()
        for _ in range(40):  # some milliseconds of work, in which the host gets ahead
            fill.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        call()
        after.record()
        after.synchronize()
        took.append(before.elapsed_time(after))
    return percentiles(took[WARM_UPS:])["p50"]
