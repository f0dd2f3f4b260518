"""Real training runs that are small: a tiny model, a few prompts, a reward that any model earns some of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.services import Service
from trainer_service import trainers
from trainer_service._trl import GRPOConfig, RLOOConfig
from trainer_service.policy_tensors import policy_tensors
from weight_transfer.digest import combine, digest_tensors

PROMPTS = ["ab", "cde", "x", "yy", "longer than the others"]


def prompts(rows: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(rows)]})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """More for more different tokens: no two rollouts of a group earn the same for long."""
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]


def model_of(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def arguments(kind: str, folder: Path, **values: Any) -> GRPOConfig | RLOOConfig:
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "vllm_server_timeout": 60,
    }
    config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[kind]
    return config(str(folder), **(defaults | values))


def make(kind: str, service: Service, model: PreTrainedModel, folder: Path, **values: Any) -> Any:
    """A trainer of `kind` over `service`; `values` are of its config, but for those that the trainer
    itself takes."""
    names = ("peft_config", "callbacks", "optimizers", "lora_mode")
    own = {name: values.pop(name) for name in names if name in values}
    cls = values.pop("cls", {"grpo": trainers.GRPOTrainer, "rloo": trainers.RLOOTrainer}[kind])
    return cls(
        model,
        reward,
        arguments(kind, folder, **values),
        prompts(),
        processing_class=models.tokenizer(),
        inference_address=service.address,
        **own,
    )


def assert_same_bits(service: Service, model: torch.nn.Module) -> None:
    """The engine has committed the model's bits, in its own dtypes."""
    names = list(service.weights.GetManifest(pb.GetManifestRequest(), timeout=30).manifest.tensors)
    values = {s.name: s.read() for s in policy_tensors(model, {t.name for t in names})}
    dtypes = [getattr(torch, pb.Dtype.Name(t.dtype).removeprefix("DTYPE_").lower()) for t in names]
    held = [values[t.name].to(dtype) for t, dtype in zip(names, dtypes, strict=True)]
    now = service.weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=True), timeout=30)
    assert now.state == pb.WEIGHT_STATE_COMMITTED
    assert now.digest == combine(digest_tensors(held))


def logged(trainer: Any, name: str) -> list[float]:
    """The values of one metric over the run."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
