"""Short runs of each algorithm over a service, watched: what the engine was asked, and what it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tests import models
from tests.integration.test_trainer_pairs import KINDS as PAIRS
from tests.integration.test_trainer_pairs import arguments as pair_arguments
from tests.services import Service
from tests.trainers import PROMPTS, arguments, model_of, reward
from trainer_service import trainers

GROUPS = {"grpo": trainers.GRPOTrainer, "rloo": trainers.RLOOTrainer}
ALL = [*GROUPS, *PAIRS]
#: What a trainer takes itself; the rest is of its configuration.
OWN = (
    "train_dataset",
    "eval_dataset",
    "reward_funcs",
    "processing_class",
    "tools",
    "environment_factory",
    "rollout_func",
    "peft_config",
    "lora_mode",
)


class Run:
    """A short run of one algorithm, and every request that it made of the engine."""

    def __init__(self, kind: str, service: Service, paths: list[Path], folder: Path, **values: Any) -> None:
        own = {name: values.pop(name) for name in OWN if name in values}
        dtype = values.pop("dtype", torch.float32)
        policy, reference = (model_of(path, dtype) for path in paths)
        given: dict[str, Any] = {
            "model": policy,
            "reward_funcs": reward,
            "train_dataset": Dataset.from_dict({"prompt": [PROMPTS[i % 5] for i in range(16)]}),
            "processing_class": models.tokenizer(),
            "inference_address": service.address,
        }
        values = {"max_steps": 1} | values
        if kind in GROUPS:
            cls: Any = GROUPS[kind]
            values.pop("ref_model", None)  # theirs is made of `beta`
            given["args"] = arguments(kind, folder, **values)
        else:
            cls = PAIRS[kind][0]
            if "max_completion_length" in values:
                values["max_new_tokens"] = values.pop("max_completion_length")
            own_reference = values.pop("ref_model", reference)
            given |= {"args": pair_arguments(kind, folder, **values), "ref_model": own_reference}
        self.trainer = cls(**(given | own))
        self.requests: list[Any] = []
        self.rollouts: list[Any] = []
        generation = self.trainer.vllm_generation
        generate = generation._generate

        def watched(batch: Any, sampling: Any) -> Any:
            self.requests.append((list(batch), sampling))
            self.rollouts.append(generate(batch, sampling))
            return self.rollouts[-1]

        generation._generate = watched

    def __enter__(self) -> Run:
        self.trainer.train()
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.close()

    @property
    def samplings(self) -> list[Any]:
        return [sampling for _, sampling in self.requests]

    def texts(self) -> list[str]:
        """All completions."""
        ids = [list(r.token_ids) for groups in self.rollouts for group in groups for r in group]
        return list(models.tokenizer().batch_decode(ids, skip_special_tokens=True))

    def prompts(self) -> list[str]:
        """All prompts, as the engine got them."""
        ids = [list(group.token_ids) for batch, _ in self.requests for group in batch]
        return list(models.tokenizer().batch_decode(ids))
