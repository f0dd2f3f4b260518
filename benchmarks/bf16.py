"""What bfloat16 parameters learn, beside float32 ones: `python -m benchmarks.bf16`.

One small model first learns in float32, at a rate that any dtype could follow; then it goes on with another task, at
the rates that a policy is trained with, from the same (bfloat16) values and on the same batches: in float32, in
bfloat16 with torch's AdamW, and in bfloat16 with what Tandem's trainers take. The engine has no part in it: the
optimizer is the trainers', in transformers' Trainer. Writes benchmarks/results/bf16.json and docs/bf16.png.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.measure import provenance
from trainer_service.trainers.optimizer import OptimizerMixin

ROOT = Path(__file__).parent.parent
RATES = (1e-6, 5e-6, 2e-5)
STEPS, BATCH, LENGTH, VOCABULARY = 60, 16, 32, 64
RUNS = {
    "float32": (torch.float32, "kahan_sum=false"),
    "bfloat16, torch's AdamW": (torch.bfloat16, "kahan_sum=false"),
    "bfloat16, Kahan": (torch.bfloat16, None),
}


class Learner(OptimizerMixin, Trainer):
    """transformers' Trainer with the optimizer of Tandem's trainers."""


def model() -> Any:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    return make(
        AutoConfig.for_model(
            "llama",
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )


def rows(jump: int, number: int, seed: int) -> Dataset:
    """Sequences in which each token is the last one and a jump, with some noise."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (number, 1), generator=draw)
    ids = (start + jump * torch.arange(LENGTH)) % VOCABULARY
    noise = torch.randint(VOCABULARY, ids.shape, generator=draw)
    ids = torch.where(torch.rand(ids.shape, generator=draw) < 0.1, noise, ids)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def learn(
    model: Any, data: Dataset, rate: float, steps: int, optim_args: str | None, **more: Any
) -> list[float]:
    """Train the model in place; the loss of each step."""
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "use_cpu": True,
            "per_device_train_batch_size": BATCH,
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "optim_args": optim_args,
            "seed": 0,
        }
        learner = Learner(model, TrainingArguments(folder, **(values | more)), train_dataset=data)
        learner.train()
    return [entry["loss"] for entry in learner.state.log_history if "loss" in entry]


def begun(steps: int = 100) -> Any:
    """The model that all go on from: its values are bfloat16's, its dtype is float32."""
    first = model()
    learn(first, rows(3, BATCH * steps, seed=1), 1e-3, steps, "kahan_sum=false")
    return first.to(torch.bfloat16).to(torch.float32)


def compare(start: Any, rate: float, steps: int) -> dict[str, list[float]]:
    data = rows(5, BATCH * steps, seed=2)
    return {
        name: learn(copy.deepcopy(start).to(dtype), data, rate, steps, optim_args)
        for name, (dtype, optim_args) in RUNS.items()
    }


def apart(curve: list[float], other: list[float]) -> float:
    """The mean distance of two loss curves."""
    return sum(abs(a - b) for a, b in zip(curve, other, strict=True)) / len(curve)


def main() -> None:
    start = begun()
    curves = {rate: compare(start, rate, STEPS) for rate in RATES}
    figures = []
    for rate, found in curves.items():
        reference = found["float32"]
        for name, losses in found.items():
            last = sum(losses[-10:]) / 10
            figures.append(
                {
                    "rate": rate,
                    "run": name,
                    "last": round(last, 4),
                    "apart": round(apart(losses, reference), 4),
                }
            )
            print(figures[-1])
    result = {
        **provenance(),
        "steps": STEPS,
        "figures": figures,
        "losses": {str(r): c for r, c in curves.items()},
    }
    path = ROOT / "benchmarks/results/bf16.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(curves, ROOT / "docs/bf16.png")


def plot(curves: dict[float, dict[str, list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.2), layout="constrained")
    for axis, (rate, found) in zip(axes, curves.items(), strict=True):
        for (name, losses), style in zip(found.items(), ("-", ":", "--"), strict=True):
            axis.plot(losses, style, label=name, linewidth=1.4)
        axis.set_title(f"learning rate {rate:g}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
