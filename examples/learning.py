"""Every algorithm learns the demo's task: SmolLM2-135M-Instruct, sums and differences, scored on some held out.

python -m examples.learning [--algorithms grpo xpo ...]

One after the other, each over a service of its own. Figures go to docs/learning.json, the curves to
docs/learning.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.demo.__main__ import ENGINE, ENVIRONMENT, provenance, score, wait_until_ready
from examples.demo.service import Service
from examples.demo.tasks import MAX_TOKENS, Tasks
from tandem import rpc
from tandem.processes import Processes

ALGORITHMS = ("grpo", "rloo", "online_dpo", "nash_md", "xpo")
#: The reward that each logs, which rises as it learns.
REWARDS = {
    "grpo": "reward",
    "rloo": "reward",
    "online_dpo": "objective/scores",
    "nash_md": "rewards/chosen",
    "xpo": "objective/model_scores",
}
#: Rewards are in [0, 1]. Preferences are made of their differences, which a factor makes decided.
SCALE = {"nash_md": 4.0}
RESULTS = Path("docs/learning.json")
PLOT = Path("docs/learning.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.learning", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", help=argparse.SUPPRESS)  # the trainer's process
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options)
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for algorithm in options.algorithms:
        results[algorithm] = learned(algorithm, options) | provenance()
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        found = {name: results[algorithm][name] for name in ("before", "after", "seconds")}
        sys.stdout.write(f"{algorithm} {json.dumps(found)}\n")
    plot(results)


def learned(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out score before and after, and the reward of every step."""
    with tempfile.TemporaryDirectory(prefix="tdm") as name, Processes(Path(name), ENVIRONMENT) as processes:
        address = f"unix://{name}/inference.sock"
        engine = [f"{key}={value}" for key, value in (ENGINE | {"seed": str(options.seed)}).items()]
        extra = {"reference_model": options.model} if algorithm in ("nash_md", "xpo") else {}
        server = processes.start(
            "inference", "inference_service", model=options.model, addresses=address, engine=engine, **extra
        )
        with rpc.connect(address) as channel:
            service, tasks = Service(channel), Tasks(options.seed)
            wait_until_ready(service, server, processes)
            before, started = score(service, tasks), time.monotonic()
            arguments = [f"--model={options.model}", f"--steps={options.steps}", f"--seed={options.seed}"]
            command = [
                sys.executable,
                "-m",
                "examples.learning",
                f"--train={algorithm}",
                f"--address={address}",
            ]
            done = subprocess.run(
                [*command, *arguments], check=True, capture_output=True, text=True, timeout=3600
            )
            rewards = json.loads(done.stdout.splitlines()[-1])
            seconds = time.monotonic() - started
            return {"before": before, "after": score(service, tasks), "seconds": seconds, "rewards": rewards}


def train(options: argparse.Namespace) -> None:
    """Train, and print the rewards of the steps as the last line."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from optimi import StableAdamW  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer_service import trainers
    from trainer_service._trl import GRPOConfig, RLOOConfig
    from trainer_service._trl_experimental import OnlineDPOConfig

    algorithm, tasks = options.train, Tasks(options.seed)
    scale = SCALE.get(algorithm, 1.0)

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        return [scale * tasks.reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    # With Kahan summation: what bfloat16 rounds off one step is added to the next.
    optimizer = StableAdamW(
        model.parameters(), lr=4e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, triton=False
    )
    cls, config = {
        "grpo": (trainers.GRPOTrainer, GRPOConfig),
        "rloo": (trainers.RLOOTrainer, RLOOConfig),
        "online_dpo": (trainers.OnlineDPOTrainer, OnlineDPOConfig),
        "nash_md": (trainers.NashMDTrainer, trainers.NashMDConfig),
        "xpo": (trainers.XPOTrainer, trainers.XPOConfig),
    }[algorithm]
    values: dict[str, Any] = {
        "seed": options.seed,
        "max_steps": options.steps,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if algorithm in ("grpo", "rloo"):
        values |= {"num_generations": 8, "max_completion_length": MAX_TOKENS}
    else:  # pairs: 64 rollouts a step as well
        values |= {"max_new_tokens": MAX_TOKENS, "max_length": 128, "gradient_accumulation_steps": 2}
    if algorithm == "grpo":
        values["vllm_importance_sampling_correction"] = False
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = cls(  # type: ignore[operator]
            model,
            reward_funcs=reward,
            args=config(folder, **values),  # type: ignore[operator]
            train_dataset=Dataset.from_list(
                [{"prompt": task.chat, "answer": task.answer} for task in tasks.training]
            ),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            optimizers=(optimizer, None),
            inference_address=options.address,
        )
        trainer.train()
        trainer.close()
    name = REWARDS[algorithm]
    rewards = [entry[name] / scale for entry in trainer.state.log_history if name in entry]
    sys.stdout.write(json.dumps(rewards) + "\n")


def plot(results: dict[str, Any]) -> None:
    """The curves, each the mean over three steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for algorithm in (name for name in ALGORITHMS if name in results):
        rewards, found = results[algorithm]["rewards"], results[algorithm]
        smooth = [statistics.mean(rewards[max(0, i - 1) : i + 2]) for i in range(len(rewards))]
        label = f"{algorithm}: held out {found['before']:.2f} to {found['after']:.2f}"
        axes.plot(range(1, len(smooth) + 1), smooth, label=label)
    axes.set(xlabel="optimizer step", ylabel="reward", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(PLOT, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
