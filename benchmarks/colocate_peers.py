"""What others do with one GPU, each in a process of its own. One line of JSON on standard output.

python -m benchmarks.colocate_peers trl MODEL        TRL's colocate mode: an engine in the trainer's process
python -m benchmarks.colocate_peers ipc MODEL        vLLM's own IPC weight transfer, to an engine in another process
python -m benchmarks.colocate_peers generate MODEL LOADER
                                                     an engine alone, with vLLM's loader (auto) or Tandem's
python -m benchmarks.colocate_peers grpo MODEL [ADDRESS [MODE]]
                                                     steps of GRPO in TRL's colocate mode, in its server mode if the
                                                     address is http's, or in ours with a service

A process imports what it needs, then waits for a line on standard input before it touches the device.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measure import ROUNDS, WARM_UPS, percentiles
from benchmarks.workload import Workload

#: For all engines alike. Few sizes of CUDA graphs: capturing those that vLLM would choose takes minutes.
ENGINE: dict[str, Any] = {
    "kv_cache_memory_bytes": 4 << 30,
    "max_model_len": 2048,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]},
}
WORK = Workload(n_prompts=256, prompt_tokens=128, new_tokens=128)
SIZES = {  # hidden, layers, heads, intermediate, tied
    "0.6B": (1024, 28, 16, 3072, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
}
_GENERATIONS = 8
_PACKED_BYTES = 2 << 30  # a tensor must fit: the embedding of 8B is more than vLLM's usual gibibyte


def main(kind: str, model: str, *more: str) -> dict[str, Any]:
    """Measure one of them."""
    from benchmarks.colocate_steps import grpo

    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "trl": trl,
        "ipc": ipc,
        "generate": generate,
        "grpo": grpo,
    }
    # An engine in this process: one of its own would import everything anew.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if kind == "ipc":
        _have_ray()
        # It pickles the handles. CUDA opens none in the process that made it, so that the engine has one of its own.
        os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if not (kind == "grpo" and more):  # the service has the engine then
        importlib.import_module("vllm")
        if kind in ("trl", "grpo"):
            importlib.import_module("trl.trainer.grpo_trainer")
    sys.stdin.readline()
    before = used()
    found = kinds[kind](model, *more)
    held: int = found.pop("used") - before
    return found | {"held_bytes": held}


class Peer:
    """A process of this module: it starts now, and measures when it is asked what it found."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.colocate_peers", *map(str, arguments)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with this
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"} | (environment or {}),
        )

    def found(self, timeout_s: float = 300) -> dict[str, Any]:
        """What it finds, or how it failed."""
        try:
            out, _ = self._process.communicate("go\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"failed": f"it took more than {timeout_s:.0f} s"}
        if self._process.returncode:
            self._log.seek(0)
            print(self._log.read()[-3000:], file=sys.stderr, flush=True)
            return {"failed": f"it ended with {self._process.returncode}"}
        return dict(json.loads(out))


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


def on_device(shape: Qwen3Config, dtype: torch.dtype, path: str = "") -> Any:
    """A policy with random weights, made on the device."""
    with torch.device("cuda"):
        policy: Any = Qwen3ForCausalLM._from_config(shape, dtype=dtype)  # type: ignore[no-untyped-call]
    policy.name_or_path = path
    return policy


def trainers_model(path: str) -> Any:
    """The policy that the configuration at `path` describes, in bf16."""
    return on_device(Qwen3Config.from_pretrained(path), torch.bfloat16, path)


def engine_for(llm: Any) -> Any:
    """vLLM's LLM with the settings that all engines have, and weights that nobody reads from a file."""
    more = {name: ENGINE[name] for name in ("kv_cache_memory_bytes", "compilation_config")}
    return functools.partial(llm, **more, load_format="dummy")


def used() -> int:
    """Bytes of the device that are in use, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def trl(path: str) -> dict[str, Any]:
    """TRL's own `sync_weights`, a `load_weights` for each tensor; and the same in one call."""
    from accelerate import Accelerator  # type: ignore[import-untyped]

    theirs: Any = importlib.import_module("trl.generation.vllm_generation")

    theirs.LLM = engine_for(theirs.LLM)
    policy = trainers_model(path)
    generation = theirs.VLLMGeneration(
        model=policy,
        accelerator=Accelerator(),
        processing_class=AutoTokenizer.from_pretrained(path),
        mode="colocate",
        gpu_memory_utilization=0.3,  # the policy is there already
        max_model_length=ENGINE["max_model_len"],
        max_num_seqs=ENGINE["max_num_seqs"],
    )
    model = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def one_call() -> None:
        model.load_weights((name, parameter.data) for name, parameter in policy.named_parameters())
        generation.llm.reset_prefix_cache()

    found: dict[str, Any] = {"sync_per_tensor": timed(generation.sync_weights), "used": used()}
    return found | {"sync_one_call": timed(one_call)}


def ipc(path: str) -> dict[str, Any]:
    """Every tensor's CUDA IPC handle in one call, which copies each from there."""
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    module: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    llm = LLM(
        path,
        **ENGINE,
        load_format="dummy",
        weight_transfer_config=WeightTransferConfig(backend="ipc"),
    )
    llm.init_weight_transfer_engine({"init_info": {}})
    policy = trainers_model(path)

    def send(info: Any) -> None:
        llm.update_weights({"update_info": dataclasses.asdict(info)})

    def sync(packed: bool) -> None:
        llm.start_weight_update()
        tensors = ((name, parameter.data) for name, parameter in policy.named_parameters())
        arguments = module.IPCTrainerSendWeightsArgs(
            send_mode=send, packed=packed, packed_buffer_size_bytes=_PACKED_BYTES
        )
        module.IPCWeightTransferEngine.trainer_send_weights(tensors, arguments)
        llm.finish_weight_update()
        llm.reset_prefix_cache()

    found: dict[str, Any] = {"sync_handles": timed(lambda: sync(False)), "used": used()}
    return found | {"sync_packed": timed(lambda: sync(True))}


def _have_ray() -> None:
    """vLLM's module imports Ray at its head, and uses it where the engine is an actor of Ray's alone."""
    if importlib.util.find_spec("ray") is None:
        folder = tempfile.mkdtemp()
        Path(folder, "ray.py").write_text("def is_initialized():\n    return False\n")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, folder)


def generate(path: str, loader: str) -> dict[str, Any]:
    """Tokens a second of vLLM's offline engine, with logprobs."""
    from vllm import LLM, SamplingParams

    ours: dict[str, Any] = {
        "load_format": "tandem",
        "worker_extension_cls": "inference_service.worker.TandemWorker",
    }
    llm = LLM(path, **ENGINE, **({} if loader == "auto" else ours))
    sampling = SamplingParams(max_tokens=WORK.new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    rates = []
    for seed in range(_GENERATIONS + 1):
        prompts: Any = [{"prompt_token_ids": ids} for ids in WORK.prompts(seed)]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        WORK.check(sum(len(output.outputs[0].token_ids) for output in outputs))
        rates.append(WORK.tokens / seconds)
    # What the engine's process has beside weights and cache: some of it is kept and not in use.
    torchs = {
        "torch_reserved_bytes": torch.cuda.memory_reserved(),
        "torch_allocated_bytes": torch.cuda.memory_allocated(),
    }
    return {"tokens_per_s": percentiles(rates[1:]), "used": used()} | torchs


def timed(call: Callable[[], Any], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of a call, until the device is done."""
    took = []
    for _ in range(WARM_UPS + rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append((time.perf_counter() - begin) * 1e3)
    return percentiles(took[WARM_UPS:])


if __name__ == "__main__":
    # Engines print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(main(*sys.argv[1:])), file=answers, flush=True)
    os._exit(0)
