"""Steps of GRPO: in TRL's own colocate or server mode, or in ours with a service that runs."""

from __future__ import annotations

import importlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.largest_batch import largest_batch
from benchmarks.measure import percentiles

#: As many rollouts a step as were seen for TRL: 128 of 256 tokens.
MICRO_BATCH, MICRO_BATCHES, TOKENS, GROUP = 16, 8, 256, 8
STEPS = 10
_PROMPT_TOKENS = 16  # what the largest batch is asked for with


def grpo(path: str, address: str = "", mode: str = "colocate") -> dict[str, Any]:
    """Seconds of a step by phase, rollouts a second, the most of the device that was in use, and the largest batch.

    In server mode, where engine and trainer have a device each, there is no largest batch to be compared.

    Args:
        path: the model.
        address: of our inference service; or, beginning with http, of the server that TRL's server mode has; or
            nothing, for TRL's colocate mode.
        mode: TRL's word for where the engine is: colocate or server.
    """
    from benchmarks.colocate_peers import ENGINE, engine_for, trainers_model, used

    more: dict[str, Any] = {}
    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": mode}
    theirs = not address or address.startswith("http")
    if not theirs:
        options["use_vllm"] = False
        trainer_class: Any = importlib.import_module("trainer_service.trainers").GRPOTrainer
        config_class: Any = importlib.import_module("trainer_service._trl").GRPOConfig
        more["inference_address"] = address
    elif address:
        options["vllm_server_base_url"] = address
    else:
        module: Any = importlib.import_module("trl.generation.vllm_generation")
        module.LLM = engine_for(module.LLM)
    if theirs:
        trainer_class, config_class = (
            getattr(importlib.import_module("trl"), f"GRPO{n}") for n in ("Trainer", "Config")
        )
    watch = Steps()
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, at_most(used) as most:
        trainer = trainer_class(
            model=trainers_model(path),
            reward_funcs=reward,
            args=config_class(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=MICRO_BATCHES,
                num_generations=GROUP,
                max_completion_length=TOKENS,
                learning_rate=1e-6,
                optim_args="kahan_sum=false",  # the same optimizer for both, with the same memory
                beta=0.0,
                bf16=False,  # the parameters are
                gradient_checkpointing=True,
                **options,
                vllm_max_model_length=ENGINE["max_model_len"],
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                # Neither has vLLM make text of tokens that the tokenizer does not know.
                **({"generation_kwargs": {"detokenize": False}} if theirs else {}),
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"{n} and {n} make" for n in range(256)]}),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=[watch],
            **more,
        )
        generation, sync = (
            Timed(trainer.vllm_generation, "generate"),
            Timed(trainer.vllm_generation, "sync_weights"),
        )
        trainer.train()
        in_use = used()
        peak, torchs = most[0], (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
        largest = largest_batch(trainer, _PROMPT_TOKENS, TOKENS) if mode == "colocate" else None
    step = percentiles(watch.seconds[2:])
    rollouts = MICRO_BATCH * MICRO_BATCHES
    found: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "step_s": step,
        "generation_s": generation.of_each(watch.ends[1:]),
        "sync_s": sync.of_each(watch.ends[1:]),
        "rollouts_per_s": rollouts / step["p50"],
        "tokens_per_step": rollouts * TOKENS,
        "peak_bytes": peak,
        "peak_torch_bytes": torchs[0],
        "peak_torch_allocated_bytes": torchs[1],
        "largest_micro_batch": largest,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "lengths": [
            entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry
        ],
        "used": in_use,
    }
    if not theirs:
        updates = list(trainer.policy_weights.history)[2:]
        found["update_ms"] = percentiles([update.seconds * 1e3 for update in updates])
        found["bytes_per_update"] = max(update.nbytes for update in updates)
        trainer.close()
    return found


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """More for more different tokens: no two rollouts of a group earn the same for long."""
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]


class Steps(TrainerCallback):
    """Times steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.ends: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.seconds.append(self.ends[-1] - self._began)


class Timed:
    """Counts the seconds that are spent in a method of an object."""

    def __init__(self, owner: Any, name: str) -> None:
        self._calls: list[tuple[float, float]] = []  # when it returned, and its seconds
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                now = time.perf_counter()
                self._calls.append((now, now - begin))

        setattr(owner, name, timed)

    def of_each(self, ends: list[float]) -> dict[str, float]:
        """Seconds in each of the stretches of time between `ends`."""
        return percentiles(
            [
                sum(seconds for at, seconds in self._calls if begin < at <= end)
                for begin, end in itertools.pairwise(ends)
            ]
        )


@contextmanager
def at_most(used: Callable[[], int]) -> Iterator[list[int]]:
    """The most bytes of the device that were in use, looked at every 20 ms."""
    import threading

    seen, over = [used()], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen[0] = max(seen[0], used())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
