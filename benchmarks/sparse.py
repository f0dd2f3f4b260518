"""Updates of what changed alone beside whole ones: bytes and time by the share of elements that changed.

python -m benchmarks.sparse [--out FILE]

Trainer and weight services are processes of their own; the engines compute nothing, so that only updates are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import nn

from benchmarks.measure import provenance
from tests.weight_service import serve
from trainer_service.client import InferenceClient
from trainer_service.updates import UpdateStats
from trainer_service.weights import PolicyWeights
from weight_transfer.sparse import Changes, bits, pack
from weight_transfer.transports import sparse

TENSORS, SIDE = 8, 2048
SHARES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.3, 0.5, 0.7)
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


class Way:
    """One way to update an engine of its own, and what its updates took."""

    def __init__(self, address: str, *, sparse: bool) -> None:
        self._model, self._generator = network(), torch.Generator().manual_seed(1)
        self._client = InferenceClient(address)
        self._client.wait_until_serving(60)
        self._weights = PolicyWeights(self._client, lambda: self._model, transport="stream", sparse=sparse)
        self._weights.sync()

    def sync(self, share: float, most: float) -> UpdateStats:
        """Change a share of the policy, and update. A tensor of which more than `most` changed travels whole."""
        change(self._model, share, self._generator)
        sparse.BREAK_EVEN = most
        self._weights.sync()
        return self._weights.history[-1]

    def close(self) -> None:
        self._weights.detach()
        self._client.close()


def updates(addresses: Sequence[str]) -> dict[str, Any]:
    """The least of some rounds: what else the machine does adds to all. By turns: sent whole and nothing kept, changes
    whatever their share, and found to be too many, so that all goes whole."""
    whole, kept = (Way(a, sparse=keeps) for a, keeps in zip(addresses, (False, True), strict=True))
    turns = {"whole": (whole, 1.0), "changes": (kept, 1.0), "fell_back": (kept, -1.0)}
    found: dict[str, Any] = {}
    for share in SHARES:
        took: dict[str, list[UpdateStats]] = {name: [] for name in turns}
        for _ in range(ROUNDS + 1):
            for name, (way, most) in turns.items():
                took[name].append(way.sync(share, most))
        found[f"{share:g}"] = {
            name: {
                "ms": round(1e3 * min(u.seconds for u in each[1:]), 1),
                "stopped_ms": round(1e3 * min(u.stopped for u in each[1:]), 2),
                "bytes": each[-1].nbytes,
            }
            for name, each in took.items()
        }
        print(f"{share:g}", *found[f"{share:g}"].items(), flush=True)
    whole.close()
    kept.close()
    return found


def crossing(found: dict[str, Any], other: str, figure: str) -> float | None:
    """The share from which on changes take more than the `other` way, between two that were measured; None for none."""
    shares = [float(share) for share in found]
    over = [one["changes"][figure] / one[other][figure] - 1 for one in found.values()]
    last = max((i for i, more in enumerate(over) if more < 0), default=None)
    if last is None or last + 1 == len(over):
        return None
    low, high = over[last : last + 2]
    step: float = shares[last + 1] - shares[last]
    return float(round(shares[last] - low * step / (high - low), 3))


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
        addresses = [f"unix://{folder}/{k}" for k in range(2)]
        spawn = multiprocessing.get_context("spawn")
        services = [spawn.Process(target=_serve, args=(address,)) for address in addresses]
        for service in services:
            service.start()
        try:
            results["updates"] = found = updates(addresses)
        finally:
            for service in services:
                service.kill()
                service.join(10)
    results["break_even"] = {
        f"{figure} beside {other}": crossing(found, other, figure)
        for other in ("whole", "fell_back")
        for figure in ("ms", "stopped_ms", "bytes")
    }
    print(results["break_even"], flush=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
