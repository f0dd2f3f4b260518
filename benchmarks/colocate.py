"""Updates of an engine on the trainer's own GPU: aliased and written, beside what others do and the device can.

    python -m benchmarks.colocate --sizes 0.6B 4B 8B --out FILE

Needs one CUDA device, vLLM and TRL. Qwen3's shapes in bf16, random weights. A sync is what the trainer waits for
around a step of its optimizer: taking the lease, commit, and looking at what it wrote. The optimizer here writes
nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.colocate_peers import ENGINE, timed, used
from benchmarks.measure import ROUNDS, WARM_UPS, percentiles, provenance
from tests.models import tokenizer
from tests.services import Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.policy_tensors import policy_tensors
from trainer_service.weights import PolicyWeights
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.write import write

SIZES = {  # hidden, layers, heads, intermediate, tied
    "0.6B": (1024, 28, 16, 3072, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
}


def main() -> None:
    """Measure each size, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colocate")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--generate", default="0.6B", help="the size at which generation is compared")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/colocate.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {
        "provenance": provenance(),
        "gpu": torch.cuda.get_device_name(),
        "eager": options.eager,
    }
    if options.out.exists():
        found = json.loads(options.out.read_text()) | found
    for size in options.sizes:
        found[size] = kernels(size)
        torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory(prefix="tdm") as folder:
            model = make(size, Path(folder, "model"))
            found[size] |= syncs(model, Path(folder), eager=options.eager)
            keep(found, options.out)
            gc.collect()
            torch.cuda.empty_cache()  # or the peers would have less of the device
            if not options.alone:
                found[size]["trl_colocate"] = peer("trl", model)
                keep(found, options.out)
                found[size]["vllm_ipc"] = peer("ipc", model)
                found[size]["ratios"] = ratios(found[size])
            if size == options.generate:
                loaders = ("auto", "tandem")
                found[size]["generate"] = {loader: peer("generate", model, loader) for loader in loaders}
        keep(found, options.out)
        print(size, json.dumps(found[size]), flush=True)


def keep(found: dict[str, Any], out: Path) -> None:
    """Write what there is, if what comes fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")


def peer(*arguments: str | Path) -> dict[str, Any]:
    """What a process of `benchmarks.colocate_peers` found, or how it failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.colocate_peers", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, timeout=400, env={**os.environ}
            )
        except subprocess.TimeoutExpired:
            return {"failed": "it took more than 400 s"}
        log.seek(0)
        if done.returncode:
            print(log.read()[-3000:], file=sys.stderr, flush=True)
            return {"failed": f"it ended with {done.returncode}"}
    return dict(json.loads(done.stdout))


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """The medians beside one another, and what the second copy of the weights costs."""
    aliased, written = found["sync_aliased"]["p50"], found["sync_written_fp32"]["p50"]
    pairs = {
        "aliased / TRL colocate": (aliased, found["trl_colocate"].get("sync_per_tensor")),
        "aliased / one load_weights": (aliased, found["trl_colocate"].get("sync_one_call")),
        "aliased / vLLM IPC": (aliased, found["vllm_ipc"].get("sync_handles")),
        "written fp32 / TRL colocate": (written, found["trl_colocate"].get("sync_per_tensor")),
    }
    ratio = {name: ours / theirs["p50"] for name, (ours, theirs) in pairs.items() if theirs}
    ratio["write kernel / device copy, GB/s"] = found["write_fp32"]["gb_s"] / found["device_copy"]["gb_s"]
    if held := found["trl_colocate"].get("held_bytes"):
        ratio["copies of the weights fewer than TRL colocate"] = (
            held - found["engine_and_trainer_bytes"]
        ) / found["bytes_bf16"]
    return ratio


def config(size: str) -> Qwen3Config:
    """A published Qwen3's shape."""
    hidden, layers, heads, intermediate, tied = SIZES[size]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def make(size: str, path: Path) -> Path:
    """A checkpoint with random weights."""
    with torch.device("cuda"):
        model: Any = Qwen3ForCausalLM._from_config(config(size), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    del model
    torch.cuda.empty_cache()
    return path


def kernels(size: str) -> dict[str, Any]:
    """Writing fp32 tensors into a bf16 arena, beside torch's batched copy of the same, and a copy of as many bytes."""
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
    found["write_fp32"] = rate(lambda: write(items, [arena]), 3 * manifest.nbytes)
    found["foreach_copy_fp32"] = rate(lambda: torch._foreach_copy_(places, values), 3 * manifest.nbytes)
    found["digest_bf16"] = rate(lambda: digest_tensors(places), manifest.nbytes)
    source, target = values[0].view(-1), torch.empty_like(values[0].view(-1))
    found["device_copy"] = rate(lambda: target.copy_(source), 2 * source.nbytes)
    return found


def rate(call: Callable[[], Any], nbytes: int) -> dict[str, float]:
    """Milliseconds of a call, until the device is done, and GB/s of the bytes that it reads and writes."""
    found = timed(call)
    return found | {"gb_s": nbytes / found["p50"] / 1e6}


def syncs(model: Path, folder: Path, *, eager: bool) -> dict[str, Any]:
    """Aliased and written syncs with an engine of this model."""
    engine = ENGINE | {"enforce_eager": eager}
    before = used()
    with inference_service(
        model, folder, wait=False, environment={"TORCHDYNAMO_DISABLE": "0"}, **engine
    ) as service:
        begin = time.perf_counter()
        with peak() as seen:
            service.wait_until("SERVING", 500)
        found: dict[str, Any] = {"start_s": time.perf_counter() - begin, "engine_bytes": used() - before}
        found["start_peak_bytes"] = seen[0] - before  # two copies of the weights at any moment would show
        with closing(InferenceClient(service.address)) as client:
            with trainer(client, model, torch.bfloat16) as (policy, weights):
                weights.sync()
                torch.cuda.empty_cache()
                found["transport"], found["aliased"] = weights.transport, weights.aliased
                found["engine_and_trainer_bytes"] = used() - before
                found["trainer_torch_bytes"] = torch.cuda.memory_allocated()
                idle = Idle(policy.parameters())
                found["sync_aliased"] = rounds(weights, idle.step)
                found["sync_aliased_by_hand"] = rounds(weights, lambda: by_hand(weights))
                found["bit_equal"] = digest_of(policy, service) == served_digest(service)
            with trainer(client, model, torch.float32) as (policy, weights):
                weights.sync()
                idle = Idle(policy.parameters())
                found["sync_written_fp32"] = rounds(weights, lambda: written(weights, idle))
                found["bit_equal"] &= digest_of(policy, service) == served_digest(service)
    return found


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes of the device that were in use, looked at every few milliseconds."""
    seen, over = [used()], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            seen[0] = max(seen[0], used())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@contextmanager
def trainer(client: InferenceClient, path: Path, dtype: torch.dtype) -> Iterator[tuple[Any, PolicyWeights]]:
    """A policy on the device, and its way to the engine."""
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    policy.to("cuda")
    weights = PolicyWeights(client, lambda: policy)
    try:
        yield policy, weights
    finally:
        weights.detach()
        torch.cuda.empty_cache()


class Idle(torch.optim.Optimizer):
    """An optimizer whose steps take no time: what is left of one is the update."""

    def __init__(self, parameters: Iterator[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def by_hand(weights: PolicyWeights) -> None:
    """What somebody does who writes parameters without an optimizer."""
    with weights.update():
        pass


def written(weights: PolicyWeights, idle: Idle) -> None:
    """As TRL does with a policy that the engine's memory cannot hold: it syncs before it generates."""
    with weights.update():  # as a step leaves it
        idle.step()
    weights.sync()


def rounds(weights: PolicyWeights, update: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one update each, and how long generation was stopped."""
    for _ in range(WARM_UPS + ROUNDS):
        update()
    last = list(weights.history)[-ROUNDS:]
    moved = {update.nbytes for update in last}
    stopped = percentiles([update.stopped * 1e3 for update in last])
    return percentiles([update.seconds * 1e3 for update in last]) | {
        "stopped_p50": stopped["p50"],
        "stopped_p95": stopped["p95"],
        "bytes": max(moved),
    }


def digest_of(policy: Any, service: Service) -> int:
    """Digest of the policy's tensors, in bf16."""
    from tandem.weights.v1.weights_pb2 import GetManifestRequest

    names = [t.name for t in service.weights.GetManifest(GetManifestRequest(), timeout=60).manifest.tensors]
    held = {source.name: source.read() for source in policy_tensors(policy, names)}
    return combine([digest_tensors([held[name].bfloat16()])[0] for name in names])


def served_digest(service: Service) -> int:
    """Digest of the engine's weights."""
    from tandem.weights.v1.weights_pb2 import GetWeightVersionRequest

    request = GetWeightVersionRequest(include_digest=True)
    return int(service.weights.GetWeightVersion(request, timeout=120).digest)


if __name__ == "__main__":
    main()
