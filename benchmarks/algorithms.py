"""Ten steps of each algorithm on one device: figures of every step, and what becomes of the device's memory.

    python -m benchmarks.algorithms --out FILE [--algorithms nash_md xpo] [--modes server]

The trainer and one engine for all runs share the device. Some layers of SmolLM2-135M's shape with random weights;
colocate mode (the trainer's parameters are the engine's memory) with sleep mode off and on, and server mode (the stream
transport). Prompts and completions are of one length, and after every step all that the trainer's allocator only caches
is given back: what is then in use more from step to step is a leak, and nothing else is. On a CPU, which has no such
count, `allocated` is of the tensors that Python knows, and `device` is 0.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import tempfile
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.measure import end_in_order, percentiles, provenance
from tests.models import tokenizer
from tests.services import Service, inference_service

#: Trainer and configuration, and where the latter is from. Imported while the engine starts.
ALGORITHMS: dict[str, tuple[str, str, str]] = {
    "grpo": ("GRPOTrainer", "GRPOConfig", "trainer_service._trl"),
    "rloo": ("RLOOTrainer", "RLOOConfig", "trainer_service._trl"),
    "online_dpo": ("OnlineDPOTrainer", "OnlineDPOConfig", "trainer_service._trl_experimental"),
    "nash_md": ("NashMDTrainer", "NashMDConfig", "trainer_service.trainers"),
    "xpo": ("XPOTrainer", "XPOConfig", "trainer_service.trainers"),
}
#: vllm_mode and sleep mode.
MODES = {"colocate": ("colocate", False), "colocate_sleep": ("colocate", True), "server": ("server", False)}
CUDA = torch.cuda.is_available()
TOKENS, BATCH = (32, 16) if CUDA else (8, 4)


def main() -> None:
    """Run each, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=[m for m in MODES if CUDA or not MODES[m][1]]
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/algorithms.json"))
    options = parser.parse_args()
    end_in_order()
    same = {
        "steps": options.steps,
        "layers": options.layers,
        "gpu": torch.cuda.get_device_name() if CUDA else None,
    }
    found: dict[str, Any] = earlier(options.out, same) | {"provenance": provenance()}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        model = make(Path(folder, "model"), options.layers)
        engine: dict[str, Any] = {
            "kv_cache_memory_bytes": (2 << 30) if CUDA else (64 << 20),
            "enable_sleep_mode": CUDA,
            "max_num_seqs": 64,
        }
        reference = f"--reference-model={model}"
        started = time.perf_counter()
        with inference_service(model, Path(folder), reference, wait=False, **engine) as service:
            for _, config, module in ALGORITHMS.values():
                getattr(importlib.import_module(module), config)
            say("imported", started)
            service.wait_until("SERVING", 400)
            say("engine serves", started)
            runs = [(name, mode) for name in options.algorithms for mode in options.modes]
            # One step of each mode that does not count: libraries keep something for the process's life.
            for mode in options.modes:
                run(options.algorithms[0], mode, service, model, Path(folder), 1)
                say(f"warm: {mode}", started)
            for name, mode in runs:
                try:
                    one = run(name, mode, service, model, Path(folder), options.steps)
                except Exception as error:  # noqa: BLE001  # the others are worth their minutes
                    traceback.print_exc()
                    one = {"error": f"{type(error).__name__}: {error}"}
                say(f"{name} {mode} {json.dumps(one)}", started)
                found["runs"].setdefault(name, {})[mode] = one | {"commit": found["provenance"]["commit"]}
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(
                    json.dumps(found, indent=1) + "\n"
                )  # what there is, if a later one fails


def say(what: str, since: float) -> None:
    """Progress, with the seconds."""
    print(f"{time.perf_counter() - since:6.1f} s: {what}", flush=True)


def earlier(file: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What `file` has of a device, a model and a number of steps that are the `same`, to add to."""
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        if {name: found.get(name) for name in same} == same:
            return found
    return same | {"runs": {}}


def make(path: Path, layers: int) -> Path:
    """A checkpoint with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


class Steps(TrainerCallback):
    """Times steps, and looks at the memory after each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[dict[str, int]] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.memory.append(memory())


def run(name: str, mode: str, service: Service, path: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One training run."""
    from datasets import Dataset  # type: ignore[import-untyped]

    from trainer_service import trainers
    from trainer_service.client import InferenceClient

    trainer_class, config_class, module = ALGORITHMS[name]
    vllm_mode, sleeps = MODES[mode]
    longest: dict[str, Any] = {"max_new_tokens": TOKENS, "max_length": 128}
    if name in ("grpo", "rloo"):
        longest = {"max_completion_length": TOKENS, "num_generations": 4}
    before, watch = memory(), Steps()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    trainer = getattr(trainers, trainer_class)(
        model=policy,
        reward_funcs=different,
        args=getattr(importlib.import_module(module), config_class)(
            str(folder / "out"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            use_cpu=not CUDA,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            vllm_mode=vllm_mode,
            vllm_enable_sleep_mode=sleeps,
            vllm_server_timeout=60,
            generation_kwargs={"min_tokens": TOKENS},
            **longest,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"the prompt {i:02}" for i in range(64)]}),
        processing_class=tokenizer(),
        inference_address=service.address,
        callbacks=[watch],
    )
    first = version(service)
    try:
        trainer.train()
        found = figures(trainer, watch) | {"versions": version(service) - first}
    finally:
        trainer.close()
        with closing(InferenceClient(service.address)) as client:
            client.wake_up()
    # Of every step, less what was in use before the run; then from the second step to the last.
    for kind in before:
        each = [now[kind] for now in watch.memory]
        found[f"{kind}_bytes"] = [now - before[kind] for now in each]
        found[f"{kind}_bytes_grown"] = each[-1] - each[min(1, steps - 1)]
    del trainer, policy
    left = memory()
    return found | {f"{kind}_bytes_left": left[kind] - before[kind] for kind in before}


def figures(trainer: Any, watch: Steps) -> dict[str, Any]:
    """What a run says of itself."""
    history = list(trainer.policy_weights.history)
    return {
        "transport": trainer.policy_weights.transport,
        "aliased": trainer.policy_weights.aliased,
        "steps": trainer.state.global_step,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_s": percentiles(watch.seconds[1:] or watch.seconds),
        "sync_ms": percentiles([update.seconds * 1e3 for update in history[1:] or history]),
        "bytes_per_sync": max(update.nbytes for update in history[1:] or history),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if CUDA else None,
    }


def different(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """More for more different tokens."""
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]


def version(service: Service) -> int:
    """The engine's weight version."""
    from tandem.weights.v1.weights_pb2 import GetWeightVersionRequest

    return int(service.weights.GetWeightVersion(GetWeightVersionRequest(), timeout=60).weight_version)


def memory() -> dict[str, int]:
    """Bytes in use of the device, by whomever, and by this process's tensors, once what is unused is given back."""
    gc.collect()
    if not CUDA:
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if issubclass(type(one), torch.Tensor) and one.layout == torch.strided
        }
        return {"device": 0, "allocated": sum(storages.values())}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"device": total - free, "allocated": torch.cuda.memory_allocated()}


if __name__ == "__main__":
    main()
