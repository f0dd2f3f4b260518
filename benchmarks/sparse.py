"""Updates of what changed alone beside whole ones: bytes and time by the share of elements that changed.

python -m benchmarks.sparse [--out FILE]

Trainer and weight service are two processes; the engine computes nothing, so that only the update is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import nn

from benchmarks.measure import provenance
from tests.weight_service import serve
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.sparse import Changes, bits, pack
from weight_transfer.transports import sparse

TENSORS, SIDE = 8, 2048
SHARES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
ROUNDS = 7


def network() -> nn.Module:
    """bfloat16, spread as weights are."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(TENSORS)])
    return model.to(torch.bfloat16).requires_grad_(False)


def change(model: nn.Module, share: float, generator: torch.Generator) -> None:
    """As a step does it: the last bits of some elements, anywhere."""
    for parameter in model.parameters():
        flat = bits(parameter)
        where = (torch.rand(flat.shape, generator=generator) < share).nonzero().view(-1)
        flat[where] ^= torch.randint(1, 4, where.shape, generator=generator, dtype=flat.dtype)


def _serve(address: str) -> None:
    torch.set_num_threads(1)
    asyncio.run(serve(address, 60.0, network, 1 << 20))


def updates(address: str) -> dict[str, Any]:
    model, generator = network(), torch.Generator().manual_seed(1)
    client = InferenceClient(address)
    client.wait_until_serving(60)
    found: dict[str, Any] = {}
    ways = {"whole": None, **{f"{share:g}": share for share in SHARES}}
    weights = {
        name: PolicyWeights(client, lambda: model, transport="stream", sparse=name != "whole")
        for name in ways
    }
    # Whatever the share, changes travel as such: where the two curves cross is what is looked for.
    sparse.BREAK_EVEN = 1.0
    for name, share in ways.items():
        one = weights[name]
        seconds = []
        for _ in range(ROUNDS + 2):
            change(model, 0.01 if share is None else share, generator)
            began = time.perf_counter()
            one.sync()
            seconds.append(time.perf_counter() - began)
        stats = one.history[-1]
        timed = [1e3 * s for s in seconds[2:]]
        found[name] = {
            "ms": round(statistics.median(timed), 1),
            "bytes": stats.nbytes,
            "stopped_ms": round(1e3 * statistics.median(u.stopped for u in list(one.history)[2:]), 2),
        }
        print(name, found[name], flush=True)
        one.detach()
    client.close()
    return found


def compressors() -> dict[str, Any]:
    """One tensor at 1 %: bytes of each changed element, and microseconds for a thousand, packing and unpacking."""
    generator = torch.Generator().manual_seed(1)
    value = next(network().parameters()).detach()
    flat = bits(value)
    where = (torch.rand(flat.shape, generator=generator) < 0.01).nonzero().view(-1)
    # Packed, and not compressed: what each then gets.
    raws = [_raw(packed, value) for packed in pack(Changes(0, where, flat[where]), 1 << 20)]
    ways: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        "none": (bytes, bytes),
        **{
            f"zstd {n}": (zstandard.ZstdCompressor(level=n).compress, zstandard.ZstdDecompressor().decompress)
            for n in (1, 3, 9)
        },
        **{f"deflate {n}": (lambda raw, n=n: zlib.compress(raw, n), zlib.decompress) for n in (1, 6)},  # type: ignore[misc]
    }
    found = {}
    for name, (compress, decompress) in ways.items():
        packing, unpacking = [], []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            small = [compress(raw) for raw in raws]
            middle = time.perf_counter()
            for one in small:
                decompress(one)
            packing.append(middle - began)
            unpacking.append(time.perf_counter() - middle)
        found[name] = {
            "bytes_per_element": round(sum(map(len, small)) / len(where), 3),
            "pack_us_per_1000": round(1e9 * min(packing) / len(where), 1),
            "unpack_us_per_1000": round(1e9 * min(unpacking) / len(where), 1),
        }
        print(name, found[name], flush=True)
    return found


def _raw(packed: Any, value: torch.Tensor) -> bytes:
    if not packed.compressed:
        return bytes(packed.data)
    return zstandard.ZstdDecompressor().decompress(packed.data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sparse_cpu.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = provenance() | {
        "elements": TENSORS * SIDE**2,
        "dtype": "bfloat16",
        "compressors": compressors(),
    }
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        address = f"unix://{folder}/s"
        service = multiprocessing.get_context("spawn").Process(target=_serve, args=(address,))
        service.start()
        try:
            results["updates"] = updates(address)
        finally:
            service.kill()
            service.join(10)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
