"""The trainer's process: TRL's GRPO, with the one import and the one address that Tandem needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from optimi import StableAdamW  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig  # type: ignore[attr-defined]

from examples.demo.tasks import MAX_TOKENS, Tasks
from trainer_service.trainers import GRPOTrainer


class Report(TrainerCallback):
    """Writes a line of JSON for each step, for whoever watches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainer: GRPOTrainer | None = None
        self.seen = 0

    def on_log(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        """TRL logs once a step, and once more at the end, without a reward."""
        assert self.trainer is not None  # noqa: S101  for the type checker
        assert self.trainer.policy_weights is not None  # noqa: S101
        weights = self.trainer.policy_weights
        logs = values["logs"]
        if "reward" not in logs:
            return
        updates, self.seen = list(weights.history)[self.seen :], len(weights.history)
        line = {
            "step": state.global_step,
            "reward": float(logs["reward"]),
            "tokens_per_second": float(logs["tandem/tokens_per_second"]),
            "weight_version": weights.weight_version,
            "transport": weights.transport,
            "aliased": weights.aliased,
            "updates": [{"ms": 1e3 * update.seconds, "bytes": update.nbytes} for update in updates],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="what the service started from")
    parser.add_argument("--address", required=True, help="the inference service's")
    parser.add_argument("--report", type=Path, required=True, help="file to write a line to after each step")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    tasks = Tasks(options.seed)

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float | None]:
        return [tasks.reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    # In the engine's own dtype, so that the parameters can be the engine's memory.
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="eager"
    )
    # With Kahan summation: what bfloat16 rounds off one step is added to the next. Without, little is learned.
    optimizer = StableAdamW(
        model.parameters(), lr=4e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, triton=False
    )
    report = Report(options.report)
    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(
            str(options.report.parent / "trainer"),
            seed=options.seed,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,  # 64 rollouts a step, in the memory that 16 take
            num_generations=8,
            max_completion_length=MAX_TOKENS,
            # The same bits sample and train: there is nothing to correct, and it would cost a forward pass.
            vllm_importance_sampling_correction=False,
            bf16=False,  # autocast, which a model in bfloat16 does not need
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        Dataset.from_list([{"prompt": task.chat, "answer": task.answer} for task in tasks.training]),
        callbacks=[report],
        optimizers=(optimizer, None),
        inference_address=options.address,
    )
    report.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.close()


if __name__ == "__main__":
    main()
