"""Updates of an engine on another GPU of the host, by NCCL, beside what others do and what the link can.

    python -m benchmarks.server_mode --sizes 0.6B 4B --out FILE

Needs two CUDA devices, vLLM and TRL: the engines are on the first, the trainer on the second. Qwen3's shapes in bf16,
random weights, torch.compile and CUDA graphs on. A sync is what the trainer waits for, from its call to the commit. All
engines of a run are up before anything is measured; each is measured while the others rest.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.colocate import digest_of, keep, make, served_digest
from benchmarks.colocate_peers import SIZES
from benchmarks.measure import ROUNDS, WARM_UPS, end_in_order, free_port, percentiles, provenance
from benchmarks.server_sparse import changes, passes
from benchmarks.workload import Workload
from tests.services import Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.cuda.nccl import Communicator, unique_id
from weight_transfer.digest import Digester

ENGINE_GPU, TRAINER_GPU = 0, 1
DEVICE = torch.device("cuda", TRAINER_GPU)
RUNNING = 64
#: For all engines alike.
ENGINE: dict[str, Any] = {
    "kv_cache_memory_bytes": 3 << 30,
    "gpu_memory_utilization": 0.1,
    "max_model_len": 1024,
    "max_num_seqs": RUNNING,
    "max_num_batched_tokens": 2048,
    "cudagraph_capture_sizes": [1, 8, RUNNING],
}
START_S = 420.0
_PEER_S = 120.0
_RAW_BYTES = 4 << 30


def main() -> None:
    """Measure each size, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_mode")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--peers", nargs="*", choices=SIZES, default=None, help="the sizes at which TRL runs too"
    )
    parser.add_argument("--sparse-peer", action="store_true", help="with vLLM's sparse_nccl, one engine more")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server.json"))
    options = parser.parse_args()
    end_in_order()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {"provenance": provenance(), "gpus": [torch.cuda.get_device_name(i) for i in range(2)]}
    found["eager"] = options.eager
    with tempfile.TemporaryDirectory(prefix="tdm") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        models = {size: make(size, folder / f"model-{size}") for size in options.sizes}
        begin = time.perf_counter()
        ours = {
            size: stack.enter_context(engine(models[size], folder / size, options.eager)) for size in models
        }
        beside = models if options.peers is None else [size for size in models if size in options.peers]
        theirs = {size: stack.enter_context(vllm_serve(models[size], folder / size)) for size in beside}
        sparse = {
            size: stack.enter_context(vllm_serve(models[size], folder / f"{size}-s", backend="sparse_nccl"))
            for size in (beside if options.sparse_peer else ())
        }
        for service in ours.values():
            service.wait_until("SERVING", START_S)
        for peer in (*theirs.values(), *sparse.values()):
            peer.wait()
        found["start_s"] = time.perf_counter() - begin
        for size, model in models.items():
            found[size] = {"bytes": sum(p.stat().st_size for p in model.glob("*.safetensors"))}
            found[size] |= syncs(ours[size], model)
            keep(found, options.out)
            if size in theirs:
                found[size]["trl"] = theirs[size].measure(model)
            if size in sparse:
                found[size]["vllm_sparse_nccl"] = sparse[size].measure(model, "sparse")
            found[size]["ratios"] = ratios(found[size])
            keep(found, options.out)
            print(size, json.dumps(found[size]), flush=True)


def engine(
    model: Path, folder: Path, eager: bool, settings: dict[str, Any] = ENGINE
) -> contextlib.AbstractContextManager[Service]:
    """Our service on the first GPU."""
    arguments = {name: value for name, value in settings.items() if name != "cudagraph_capture_sizes"}
    graphs = {"cudagraph_capture_sizes": settings["cudagraph_capture_sizes"]}
    environment = on_devices(ENGINE_GPU) | {"TORCHDYNAMO_DISABLE": "0"}
    return inference_service(
        model,
        folder,
        wait=False,
        environment=environment,
        enforce_eager=eager,
        compilation_config=json.dumps(graphs),
        **arguments,
    )


def syncs(service: Service, path: Path) -> dict[str, Any]:
    """Updates of every kind, of an engine that rests and of one that generates."""
    found: dict[str, Any] = {}
    with closing(InferenceClient(service.address)) as client:
        for mode in ("in_place", "staged"):
            with trainer(client, path, torch.bfloat16, mode) as (policy, weights):
                began = time.perf_counter()
                weights.sync()
                found[f"{mode}_first_ms"] = (time.perf_counter() - began) * 1e3
                found["transport"] = weights.transport
                found[f"{mode}_bf16"] = rounds(weights)
                found["bit_equal"] = digest_of(policy, service) == served_digest(service)
                found[f"{mode}_bf16_running"] = while_generating(client, weights)
                found["bit_equal"] &= digest_of(policy, service) == served_digest(service)
                if mode == "in_place":
                    found["nbytes"] = weights.bytes_moved
                    values = [parameter.detach() for parameter in policy.parameters()]
                    found["digest_alone_ms"] = digest_ms(values)
                    found["raw_broadcast"] = raw(sum(value.nbytes for value in values))
        found["sparse"] = {}
        for mode in ("in_place", "staged"):
            with trainer(client, path, torch.bfloat16, mode, sparse=True) as (policy, weights):
                found["sparse"][mode] = changes(policy, weights)
                found["bit_equal"] &= digest_of(policy, service) == served_digest(service)
                if mode == "staged":
                    found["sparse"]["passes"] = passes(policy, weights)
                    nbytes = found["sparse"]["in_place"]["0.01"]["nbytes"]
                    found["sparse"]["raw_broadcast"] = raw(nbytes)
        with trainer(client, path, torch.float32, "in_place") as (policy, weights):
            weights.sync()
            found["in_place_fp32"] = rounds(weights)
            found["bit_equal"] &= digest_of(policy, service) == served_digest(service)
    return found


@contextmanager
def trainer(
    client: InferenceClient, path: Path, dtype: torch.dtype, mode: str, *, sparse: bool = False
) -> Iterator[tuple[Any, PolicyWeights]]:
    """A policy on the second GPU, and its way to the engine."""
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    policy.to(DEVICE)
    weights = PolicyWeights(client, lambda: policy, transport="nccl", mode=mode, sparse=sparse)
    try:
        yield policy, weights
    finally:
        weights.detach()
        gc.collect()
        torch.cuda.empty_cache()


def rounds(weights: PolicyWeights, n: int = WARM_UPS + ROUNDS, gap_s: float = 0.0) -> dict[str, Any]:
    """Milliseconds of one update each, of its parts, and for how long generation was stopped."""
    for _ in range(n):
        weights.sync()
        time.sleep(gap_s)
    last = list(weights.history)[-(n - WARM_UPS) :]
    parts = {
        "ready": [u.ready for u in last],
        "commit": [u.committed for u in last],
        "stopped": [u.stopped for u in last],
    }
    found: dict[str, Any] = percentiles([update.seconds * 1e3 for update in last])
    for name, seconds in parts.items():
        values = percentiles([s * 1e3 for s in seconds])
        found[f"{name}_p50"], found[f"{name}_p95"] = values["p50"], values["p95"]
    return found | {"gb_s": last[-1].nbytes / found["p50"] / 1e6}


def while_generating(client: InferenceClient, weights: PolicyWeights) -> dict[str, Any]:
    """Updates while rollouts run: for how long each stops them, and whether all come to their end.

    Between two there is time to read anew, by the new version, what each has so far.
    """
    work = Workload(n_prompts=RUNNING, prompt_tokens=16, new_tokens=250)
    begun, over = threading.Event(), threading.Event()
    asked: list[Any] = []  # what is not given was dropped, also where a whole batch failed
    rollouts: list[Any] = []

    def generate() -> None:
        seed = 0
        while not over.is_set():
            prompts = [(prompt, 1) for prompt in work.prompts(seed)]
            sampling = {"max_tokens": work.new_tokens, "temperature": 1.0, "ignore_eos": True}
            asked.extend(prompts)
            begun.set()
            groups = client.generate(prompts, sampling)
            rollouts.extend(rollout for group in groups for rollout in group)
            seed += 1

    generating = threading.Thread(target=generate)
    generating.start()
    begun.wait()
    time.sleep(1)
    try:
        found = rounds(weights, gap_s=0.2)
    finally:
        over.set()
        generating.join()
    whole = sum(len(rollout.token_ids) == work.new_tokens for rollout in rollouts)
    return found | {"rollouts": len(rollouts), "dropped": len(asked) - whole}


def digest_ms(values: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of the policy's digest alone, on the trainer's GPU. In an update it runs beside the transfer."""
    digester = Digester(values)
    return percentiles([timed(digester.digests) for _ in range(WARM_UPS + ROUNDS)][WARM_UPS:])


def raw(nbytes: int) -> dict[str, float]:
    """As many bytes broadcast between two threads of this process, from and to the same few gigabytes."""
    pieces = [min(_RAW_BYTES, nbytes - start) for start in range(0, nbytes, _RAW_BYTES)]
    memory = [torch.empty(pieces[0], dtype=torch.uint8, device=torch.device("cuda", i)) for i in range(2)]
    identity, took = unique_id(), []
    meet = threading.Barrier(2)

    def rank(i: int) -> None:
        with torch.cuda.device(i):
            communicator = Communicator(identity, i, 2, torch.device("cuda", i), lambda: None)
            for _ in range(WARM_UPS + ROUNDS):
                torch.cuda.synchronize(i)
                meet.wait()
                begin = time.perf_counter()
                for piece in pieces:
                    sent = communicator.broadcast([(memory[i].data_ptr(), piece)], TRAINER_GPU, lambda: None)
                communicator.wait(sent)
                if i == TRAINER_GPU:
                    took.append((time.perf_counter() - begin) * 1e3)
            meet.wait()
            communicator.abort()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = percentiles(took[WARM_UPS:])
    return found | {"gb_s": nbytes / found["p50"] / 1e6}


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class Served:
    """`vllm serve` with vLLM's own NCCL weight transfer, which TRL's client drives."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self._process, self._log = port, process, log

    def wait(self) -> None:
        """Until it answers. A start that failed is seen by `measure`."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.5)

    def measure(self, model: Path, way: str = "dense") -> dict[str, Any]:
        """What its client needs, in a process that has the second GPU alone; or how it failed."""
        peer = ["-m", "benchmarks.server_peer", str(self.port), str(model), way]
        command = [sys.executable, "-W", "ignore", *peer]
        environment = os.environ | on_devices(TRAINER_GPU)
        with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as out:
            try:
                code = subprocess.run(
                    command, stdout=out, stderr=log, timeout=_PEER_S, env=environment, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
            log.seek(0)
            out.seek(0)
            if code == 0:
                return dict(json.loads(out.read().splitlines()[-1]))
            print(log.read()[-3000:], self._log.read_text()[-3000:], file=sys.stderr, flush=True)
        return {"failed": f"it took {_PEER_S:g} s" if code is None else f"it ended with {code}"}


@contextmanager
def vllm_serve(
    model: Path, folder: Path, settings: dict[str, Any] = ENGINE, backend: str = "nccl"
) -> Iterator[Served]:
    """`vllm serve` on the first GPU, as TRL starts it."""
    port = free_port()
    flags = [
        "--weight-transfer-config",
        json.dumps({"backend": backend}),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    for name, value in settings.items():
        if name == "cudagraph_capture_sizes":
            flags += ["--compilation-config", json.dumps({name: value})]
        else:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    environment = on_devices(ENGINE_GPU) | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*server, *flags], stdout=out, stderr=out, env=os.environ | environment, start_new_session=True
        )
    try:
        yield Served(port, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """The medians beside one another."""
    ours, trl = found["in_place_bf16"]["p50"], found.get("trl", {})
    pairs = {
        "raw broadcast / in place": (found["raw_broadcast"]["p50"], ours),
        "digest alone / in place": (found["digest_alone_ms"]["p50"], ours),
        "in place / TRL update_model_params": (ours, trl.get("update_model_params", {}).get("p50")),
        "sparse, 1 % / in place": (found["sparse"]["in_place"]["0.01"]["p50"], ours),
        "sparse, 1 % / reading policy and base": (
            found["sparse"]["in_place"]["0.01"]["p50"],
            found["sparse"]["passes"]["reading_p50"],
        ),
        "in place / TRL for each parameter": (ours, trl.get("per_parameter", {}).get("p50")),
    }
    return {name: one / other for name, (one, other) in pairs.items() if other}


if __name__ == "__main__":
    main()
