"""Ten steps of each algorithm on one device: figures of every step, and what is left of the device's memory.

    python -m benchmarks.algorithms --out FILE

The trainer and the engine share the device. A model of SmolLM2-135M's shape with random weights; colocate mode (the
trainer's parameters are the engine's memory) with sleep mode off and on, and server mode (the stream transport).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.measure import percentiles, provenance
from tests.models import tokenizer
from tests.services import Service, inference_service
from tests.trainers import prompts, reward
from trainer_service import trainers
from trainer_service._trl import GRPOConfig, RLOOConfig
from trainer_service._trl_experimental import OnlineDPOConfig
from trainer_service.client import InferenceClient

ALGORITHMS: dict[str, tuple[Any, Any]] = {
    "grpo": (trainers.GRPOTrainer, GRPOConfig),
    "rloo": (trainers.RLOOTrainer, RLOOConfig),
    "online_dpo": (trainers.OnlineDPOTrainer, OnlineDPOConfig),
    "nash_md": (trainers.NashMDTrainer, trainers.NashMDConfig),
    "xpo": (trainers.XPOTrainer, trainers.XPOConfig),
}
#: vllm_mode and sleep mode.
MODES = {"colocate": ("colocate", False), "colocate, sleep": ("colocate", True), "server": ("server", False)}
TOKENS, BATCH = 32, 16
CUDA = torch.cuda.is_available()


def main() -> None:
    """Run each, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/algorithms.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"provenance": provenance(), "steps": options.steps, "layers": options.layers}
    found["runs"] = {}
    found["gpu"] = torch.cuda.get_device_name() if CUDA else None
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        model = make(Path(folder, "model"), options.layers)
        engine: dict[str, Any] = {
            "kv_cache_memory_bytes": (2 << 30) if CUDA else (64 << 20),
            "enable_sleep_mode": CUDA,
        }
        reference = f"--reference-model={model}"
        with inference_service(model, Path(folder), reference, wait=False, **engine) as service:
            service.wait_until("SERVING", 400)
            for name, mode, one in runs(service, model, Path(folder), options):
                found["runs"].setdefault(name, {})[mode] = one
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(
                    json.dumps(found, indent=2) + "\n"
                )  # what there is, if a later one fails


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


def runs(
    service: Service, model: Path, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each algorithm in each mode; the first twice over: what a first run leaves may be a library's."""
    kinds = [(name, mode) for name in options.algorithms for mode in MODES if CUDA or not MODES[mode][1]]
    for name, mode in [kinds[0], *kinds]:
        one = run(name, mode, service, model, folder, options.steps)
        print(name, mode, json.dumps(one), flush=True)
        yield name, mode, one


class Steps(TrainerCallback):
    """Times steps, and looks at the device's memory after each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.used: list[int] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.used.append(used())


def run(name: str, mode: str, service: Service, path: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One training run."""
    trainer_class, config_class = ALGORITHMS[name]
    vllm_mode, sleeps = MODES[mode]
    longest: dict[str, Any] = {"max_new_tokens": TOKENS, "max_length": 128}
    if name in ("grpo", "rloo"):
        longest = {"max_completion_length": TOKENS, "num_generations": 4}
    before, watch = used(), Steps()
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward,
        args=config_class(
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
            **longest,
        ),
        train_dataset=prompts(64),
        processing_class=tokenizer(),
        inference_address=service.address,
        callbacks=[watch],
    )
    first = version(service)
    trainer.train()
    history = list(trainer.policy_weights.history)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "transport": trainer.policy_weights.transport,
        "aliased": trainer.policy_weights.aliased,
        "steps": trainer.state.global_step,
        "versions": version(service) - first,
        "losses": [entry["loss"] for entry in logs],
        "step_s": percentiles(watch.seconds[1:]),
        "sync_ms": percentiles([update.seconds * 1e3 for update in history[1:]]),
        "bytes_per_sync": max(update.nbytes for update in history[1:]),
        "device_bytes_after_step_2": watch.used[1] - before,
        "device_bytes_after_last_step": watch.used[-1] - before,
    }
    trainer.close()
    with closing(InferenceClient(service.address)) as client:
        client.wake_up()
    del trainer, policy
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return found | {"device_bytes_left": used() - before}


def version(service: Service) -> int:
    """The engine's weight version."""
    from tandem.weights.v1.weights_pb2 import GetWeightVersionRequest

    return int(service.weights.GetWeightVersion(GetWeightVersionRequest(), timeout=60).weight_version)


def used() -> int:
    """Bytes of the device that are in use, by whomever."""
    if not CUDA:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    main()
