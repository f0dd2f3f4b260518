"""Updates of an engine on the trainer's own GPU: aliased and written, beside what others do and the device can.

    python -m benchmarks.colocate --sizes 0.6B 4B 8B --parts kernels ours trl ipc --out FILE

Needs one CUDA device, vLLM and TRL. Qwen3's shapes in bf16, random weights. A sync is what the trainer waits for
around a step of its optimizer: taking the lease, commit, and looking at what it wrote. The optimizer here changes one
small parameter. Each part of each size is written to FILE as soon as it is known, beside what is there already.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.colocate_kernels import kernels
from benchmarks.colocate_peers import ENGINE, Peer, config, on_device, used
from benchmarks.colocate_sleep import sleeps
from benchmarks.measure import ROUNDS, WARM_UPS, end_in_order, percentiles, provenance
from tandem.inference.v1 import inference_pb2
from tests.models import tokenizer
from tests.services import Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.policy_tensors import policy_tensors
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensors

#: Seconds of an optimizer's step: AdamW's takes longer at each of these sizes.
STEP_S = 0.005
#: What there is to measure of each size. The peers are `benchmarks.colocate_peers`.
PARTS = ("kernels", "ours", "sleep", "grpo", "trl", "ipc", "generate")


def main() -> None:
    """Measure each size, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colocate")
    parser.add_argument("--sizes", nargs="+", default=["0.6B", "4B", "8B"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/colocate.json"))
    options = parser.parse_args()
    end_in_order()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {
        "provenance": provenance(),
        "gpu": torch.cuda.get_device_name(),
        "eager": options.eager,
        "engine": ENGINE,
    }
    for size in options.sizes:
        for name, part in parts(size, options.parts, eager=options.eager):
            found.setdefault(size, {}).setdefault("took_s", {})[name] = part.pop("took_s")
            found[size] |= part
            found[size]["ratios"] = ratios(found[size])
            keep(found, options.out)
            print(size, name, json.dumps(part), flush=True)


def parts(size: str, wanted: list[str], *, eager: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is found of a size, part by part, with the seconds that each took.

    Other processes import what they need while the first parts run, and touch the device when it is their turn.
    """
    begin = time.perf_counter()

    def done(part: dict[str, Any]) -> dict[str, Any]:
        nonlocal begin
        begin, before = time.perf_counter(), begin
        return part | {"took_s": begin - before}

    with tempfile.TemporaryDirectory(prefix="tdm", dir=shared_memory()) as folder:
        path = Path(folder, "model")
        peers = {
            "trl_colocate": ["trl", path] if "trl" in wanted else [],
            "vllm_ipc": ["ipc", path] if "ipc" in wanted else [],
            "generate_auto": ["generate", path, "auto"] if "generate" in wanted else [],
            "generate_tandem": ["generate", path, "tandem"] if "generate" in wanted else [],
            "grpo_trl_colocate": ["grpo", path] if "grpo" in wanted else [],
        }
        waiting = {name: Peer(*map(str, arguments)) for name, arguments in peers.items() if arguments}
        if "kernels" in wanted:
            yield "kernels", done(kernels(size))
            torch.cuda.empty_cache()
        make(size, path, weights=bool({"ours", "sleep", "grpo", "generate"} & set(wanted)))
        yield "checkpoint", done({})
        own: list[str] = [part for part in ("ours", "sleep", "grpo") if part in wanted]
        if own:
            yield "ours", done(ours(size, path, Path(folder), own, eager=eager))
            gc.collect()
            torch.cuda.empty_cache()  # or the peers would have less of the device
        for name, peer in waiting.items():
            yield name, done({name: peer.found()})


def shared_memory() -> str | None:
    """Where files are in memory; None where there is no such place of some size."""
    place = Path("/dev/shm")  # noqa: S108
    import shutil

    return str(place) if place.exists() and shutil.disk_usage(place).free > (24 << 30) else None


def keep(found: dict[str, Any], out: Path) -> None:
    """Write what there is, if what comes fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """The medians beside one another, and what the second copy of the weights costs."""

    def p50(*names: str) -> float | None:
        at: Any = found
        for name in names:
            at = at.get(name, {}) if isinstance(at, dict) else {}
        return at.get("p50") if isinstance(at, dict) else None

    syncs = {"aliased": p50("sync_aliased"), "written fp32": p50("sync_written_fp32")}
    others = {
        "TRL colocate": p50("trl_colocate", "sync_per_tensor"),
        "one load_weights": p50("trl_colocate", "sync_one_call"),
        "vLLM IPC": p50("vllm_ipc", "sync_handles"),
    }
    ratio = {
        f"{mine} / {theirs}": ours / other
        for mine, ours in syncs.items()
        for theirs, other in others.items()
        if ours and other
    }
    if "write_fp32" in found:
        for name in ("foreach_copy_fp32", "device_copy"):
            ratio[f"write kernel / {name}, GB/s"] = found["write_fp32"]["gb_s"] / found[name]["gb_s"]
    held = found.get("trl_colocate", {}).get("held_bytes")
    if held and "engine_and_trainer_bytes" in found:
        fewer = held - found["engine_and_trainer_bytes"]
        ratio["copies of the weights fewer than TRL colocate"] = fewer / found["weights_bytes"]
    rates = [p50(f"generate_{loader}", "tokens_per_s") for loader in ("tandem", "auto")]
    if all(rates):
        ratio["generation, aliased / engine's own"] = rates[0] / rates[1]  # type: ignore[operator]
    return ratio


def make(size: str, path: Path, *, weights: bool = True) -> Path:
    """A checkpoint with random weights, or all of one but these."""
    tokenizer().save_pretrained(path)
    config(size).save_pretrained(path)
    if weights:
        on_device(config(size), torch.bfloat16).save_pretrained(path)
        torch.cuda.empty_cache()
    return path


def ours(size: str, model: Path, folder: Path, wanted: list[str], *, eager: bool) -> dict[str, Any]:
    """An engine of this model: aliased and written syncs with it, and training."""
    engine = ENGINE | {"enforce_eager": eager} | ({"enable_sleep_mode": True} if "sleep" in wanted else {})
    arguments = {name: json.dumps(value) for name, value in engine.items()}
    before = used()
    environment = {"TORCHDYNAMO_DISABLE": "0", "OMP_NUM_THREADS": "8"}
    with inference_service(model, folder, wait=False, environment=environment, **arguments) as service:
        begin = time.perf_counter()
        training = Peer("grpo", model, service.address) if "grpo" in wanted else None
        with peak() as seen:
            service.wait_until("SERVING", 500)
        found: dict[str, Any] = {"start_s": time.perf_counter() - begin, "engine_bytes": used() - before}
        found["start_peak_bytes"] = seen[0] - before  # two copies of the weights at any moment would show
        if "ours" in wanted:
            found |= syncs(size, service, before)
            gc.collect()
            torch.cuda.empty_cache()
        if "sleep" in wanted:
            with closing(InferenceClient(service.address)) as client:
                with trainer(client, size, torch.bfloat16) as (policy, weights):
                    weights.sync()
                    generate = functools.partial(rollouts, service)
                    found["sleep"] = sleeps(
                        service, weights, Small(policy).step, generate, Same(policy, service)
                    )
        if training is not None:
            found["grpo_ours"] = training.found()
    return found


def syncs(size: str, service: Service, before: int) -> dict[str, Any]:
    """Milliseconds of an update, by each way, and whether both sides hold the same afterwards."""
    found: dict[str, Any] = {}
    with closing(InferenceClient(service.address)) as client:
        with trainer(client, size, torch.bfloat16) as (policy, weights):
            weights.sync()
            found["transport"], found["aliased"] = weights.transport, weights.aliased
            found["weights_bytes"] = sum(parameter.nbytes for parameter in policy.parameters())
            found["engine_and_trainer_bytes"] = used() - before
            found["trainer_torch_bytes"] = torch.cuda.memory_allocated()
            usual, at_once, equal = Small(policy, STEP_S), Small(policy), Same(policy, service)
            found["sync_aliased"] = rounds(weights, usual.step, equal)
            found["sync_aliased_after_rollouts"] = rounds(weights, usual.step, lambda: rollouts(service))
            found["sync_aliased_at_once"] = rounds(weights, at_once.step)
            found["sync_aliased_by_hand"] = rounds(weights, lambda: by_hand(weights))
            found["sync_with_nothing_new"] = timed_calls(weights.sync)
        with trainer(client, size, torch.float32) as (policy, weights):
            weights.sync()
            idle, also = Small(policy), Same(policy, service)
            found["sync_written_fp32"] = rounds(weights, lambda: written(weights, idle), also)
            gb_s = 3 * found["weights_bytes"] / found["sync_written_fp32"]["p50"] / 1e6
            found["sync_written_fp32"]["gb_s"] = gb_s
        found["bit_equal"] = [equal.times, also.times]
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
def trainer(client: InferenceClient, size: str, dtype: torch.dtype) -> Iterator[tuple[Any, PolicyWeights]]:
    """A policy on the device, and its way to the engine."""
    policy = on_device(config(size), dtype)
    weights = PolicyWeights(client, lambda: policy)
    try:
        yield policy, weights
    finally:
        weights.detach()
        torch.cuda.empty_cache()


class Small(torch.optim.Optimizer):
    """An optimizer whose steps change little, in a given time: the figures of updates leave steps out."""

    def __init__(self, policy: torch.nn.Module, seconds: float = 0.0) -> None:
        super().__init__(policy.parameters(), {})
        self._changes = min(policy.parameters(), key=torch.Tensor.numel)
        self._seconds = seconds

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the bits of the smallest parameter."""
        with torch.no_grad():
            self._changes.neg_()
        time.sleep(self._seconds)


def by_hand(weights: PolicyWeights) -> None:
    """What somebody does who writes parameters without an optimizer."""
    with weights.update():
        pass


def written(weights: PolicyWeights, idle: Small) -> None:
    """As TRL does with a policy that the engine's memory cannot hold: it syncs before it generates."""
    with weights.update():  # as a step leaves it
        idle.step()
    weights.sync()


def rounds(
    weights: PolicyWeights, update: Callable[[], Any], between: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Milliseconds of one update each: until Ready, from Commit to its answer, and how long generation was stopped."""
    for _ in range(WARM_UPS + ROUNDS):
        update()
        between()
    last = list(weights.history)[-ROUNDS:]
    found = percentiles([update.seconds * 1e3 for update in last])
    for name in ("ready", "committed", "stopped"):
        of = percentiles([getattr(update, name) * 1e3 for update in last])
        found |= {f"{name}_p50": of["p50"], f"{name}_p95": of["p95"]}
    return found | {"bytes": max(update.nbytes for update in last)}


def timed_calls(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call."""
    took = []
    for _ in range(WARM_UPS + ROUNDS):
        begin = time.perf_counter()
        call()
        took.append((time.perf_counter() - begin) * 1e3)
    return percentiles(took[WARM_UPS:])


def rollouts(service: Service) -> None:
    """A few, and the time that a trainer needs at least until its next step."""
    prompts = [inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=range(5, 37))) for _ in range(8)]
    sampling = inference_pb2.SamplingParams(max_tokens=8, ignore_eos=True)
    for _ in service.inference.Generate(
        inference_pb2.GenerateRequest(prompts=prompts, sampling=sampling), timeout=60
    ):
        pass
    time.sleep(0.1)


class Same:
    """Sees that the engine has the policy's bits, and counts."""

    def __init__(self, policy: Any, service: Service) -> None:
        self._policy = policy
        self._service = service
        self._names = names_of(service)
        self.times = 0

    def __call__(self) -> None:
        if digest_of(self._policy, self._service, self._names) != served_digest(self._service):
            raise ValueError("the engine's weights are not the policy's")
        self.times += 1


def names_of(service: Service) -> list[str]:
    """The names in the engine's manifest."""
    from tandem.weights.v1.weights_pb2 import GetManifestRequest

    manifest = service.weights.GetManifest(GetManifestRequest(), timeout=60).manifest
    return [tensor.name for tensor in manifest.tensors]


def digest_of(policy: Any, service: Service, names: list[str] | None = None) -> int:
    """Digest of the policy's tensors, in bf16."""
    names = names or names_of(service)
    held = {source.name: source.read() for source in policy_tensors(policy, names)}
    return combine([digest_tensors([held[name].bfloat16()])[0] for name in names])


def served_digest(service: Service) -> int:
    """Digest of the engine's weights."""
    from tandem.weights.v1.weights_pb2 import GetWeightVersionRequest

    request = GetWeightVersionRequest(include_digest=True)
    return int(service.weights.GetWeightVersion(request, timeout=120).digest)


if __name__ == "__main__":
    main()
