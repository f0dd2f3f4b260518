"""An engine of two workers, seen as one of two GPUs is: python -m tests.split_engine CHECKPOINT

The service has descriptors alone, and the workers digest and write. Their memory is the host's.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
import torch

from inference_service.arenas import Handle, HostArenas
from inference_service.collect import collect
from inference_service.device_arenas import DeviceArenas
from inference_service.engine import Engine
from inference_service.staging import Staging
from tandem.errors import DataLoss, Reason
from tests.services import ENGINE
from weight_transfer.digest import combine, digest_tensors

WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def values(text: str) -> object:
    return {"true": True}.get(text, int(text) if text.isdigit() else text)


async def check(engine: Engine) -> None:
    host = await collect(engine)
    assert isinstance(host, HostArenas), host.reason
    handles = [Handle(os.dup(h.fd), h.size, f"GPU-{h.rank}", h.rank) for h in host.handles]
    assert {handle.rank for handle in handles} == {0, 1}
    device = DeviceArenas(engine, handles, host.placements)
    assert device.gpus == ("GPU-0", "GPU-1")
    assert await device.find_digest() == host.digest()

    staging = Staging(host.manifest)
    torch.manual_seed(0)
    tensors = [torch.randn(spec.shape).to(getattr(torch, spec.dtype)) for spec in host.manifest]
    for i, tensor in enumerate(tensors):
        staging.add(i, 0, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    await device.write_staged(staging)
    wanted = combine(digest_tensors(tensors))
    assert await device.find_digest() == host.digest() == wanted

    name = "model.norm.weight"
    (norm,) = (p for p in host.placements if p.spec.name == name)
    on_both = norm.places(host.arenas)
    assert len(on_both) == 2
    on_both[1][0] += 1
    with pytest.raises(DataLoss, match=f"the ranks hold different values of {name}") as caught:
        await device.find_digest()
    assert caught.value.reason == Reason.DIGEST_MISMATCH
    on_both[1][0] -= 1
    print("CHECKED", len(host.placements), flush=True)  # noqa: T201  # read by the test


async def main(checkpoint: str) -> None:
    arguments = {name: values(text) for name, text in ENGINE.items()}
    engine = await Engine.start(checkpoint, arguments | WORKERS)
    try:
        await check(engine)
    finally:
        engine.stop_listening()
        await asyncio.to_thread(engine.stop)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
