"""TRL's trainers that learn from a teacher or from themselves: a short run of each, and TRL's own to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tests import models
from tests.trainers import PROMPTS, model_of, prompts, reward
from trainer_service import _trl_experimental as trl

DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "vllm_server_timeout": 60,
}


def messages(rows: int = 16) -> Dataset:
    """Chats whose last message the student may learn from, for trainers that mix."""
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in PROMPTS
    ]
    return Dataset.from_dict({"messages": [chats[i % len(chats)] for i in range(rows)]})


def told(rows: int = 16) -> Dataset:
    return prompts(rows).add_column("privileged_context", [f"say {i}" for i in range(rows)])


@dataclass
class Kind:
    """How one trainer is made: its class, TRL's class and config, its data, and what it takes beside."""

    ours: str
    theirs: type
    config: type
    data: Callable[[], Dataset]
    values: dict[str, Any] = field(default_factory=dict)
    rewarded: bool = False
    teacher: str = ""  # "local": a model; "served": a service, in whose place TRL's own class gets a model
    calls: int = 3  # to the engine in three steps
    syncs: tuple[int, ...] = (0, 1, 2)  # steps that began with one

    def args(self, folder: Path, **values: Any) -> Any:
        return self.config(str(folder), **(DEFAULTS | self.values | values))

    def make(self, cls: Any, model: PreTrainedModel, args: Any, teachers: Path | None, **own: Any) -> Any:
        if self.rewarded:
            own["reward_funcs"] = reward
        if teachers is not None:
            own["teacher_model"] = model_of(teachers, torch.float32)
        return cls(model, args=args, train_dataset=self.data(), processing_class=models.tokenizer(), **own)


SELF = {"num_generations": 2, "max_prompt_length": 64, "distillation_is_clip": None}
LIVE = {
    "use_teacher_server": True,
    "teacher_model_kind": "live",
    "distillation_mode": "sampled_token",
    "distillation_alpha": 1.0,
}


class Oracle:
    """A teacher by transformers, in the form of TRL's client."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def get_sequence_logprobs(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        top_logprobs: int = 100,
        temperature: float = 1.0,
    ) -> dict[str, list[Any]]:
        rows: list[Any] = []
        for ids, length in zip(sequences, prompt_lengths, strict=True):
            logits = self.model(torch.tensor([ids])).logits[0, length - 1 : -1].float()
            logprobs, completion = (logits / temperature).log_softmax(-1), torch.tensor(ids[length:])[:, None]
            top = logprobs.topk(top_logprobs)
            rows.append((top.values, top.indices, logprobs.gather(1, completion.long()), completion))
        names = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
        return {name: [row[i].tolist() for row in rows] for i, name in enumerate(names)}


class OracleTaught(trl.TrlServerDistillationTrainer):
    """TRL's, whose client is an Oracle."""

    def __init__(self, model: Any, teacher_model: PreTrainedModel, args: Any, **kwargs: Any) -> None:
        super(trl.TrlServerDistillationTrainer, self).__init__(model, None, args, **kwargs)
        for name in ("reverse_kl_top_1_mode", "loss_top_k", "loss_add_tail"):
            setattr(self, name, getattr(args, name))
        self.teacher_client = Oracle(teacher_model)


URL = {"teacher_model_server_url": "http://nobody:8000"}
TWICE = {"num_iterations": 2}
KINDS = {
    "gmpo": Kind(
        "GMPOTrainer",
        trl.TrlGMPOTrainer,
        trl.GMPOConfig,
        prompts,
        {"num_generations": 2, "beta": 0.1} | TWICE,
        rewarded=True,
        calls=2,
        syncs=(0, 2),
    ),
    "distillation": Kind(
        "DistillationTrainer",
        trl.TrlDistillationTrainer,
        trl.DistillationConfig,
        prompts,
        {"gradient_accumulation_steps": 2, "temperature": 0.8},
        teacher="local",
    ),
    "server_distillation": Kind(
        "ServerDistillationTrainer",
        OracleTaught,
        trl.ServerDistillationConfig,
        prompts,
        {"gradient_accumulation_steps": 2, "temperature": 0.7, "beta": 0.5} | URL,
        teacher="served",
    ),
    "gold": Kind(
        "GOLDTrainer",
        trl.TrlGOLDTrainer,
        trl.GOLDConfig,
        messages,
        {"lmbda": 1.0, "max_length": 128, "gradient_accumulation_steps": 2, "vllm_sync_frequency": 2},
        teacher="local",
        syncs=(0, 2),
    ),
    "iw_opd": Kind(
        "IWOPDTrainer",
        trl.TrlIWOPDTrainer,
        trl.IWOPDConfig,
        messages,
        {"max_length": 128, "distillation_objective": "jsd", "beta": 0.5, "gradient_accumulation_steps": 2},
        teacher="local",
    ),
    "iw_opd_served": Kind(
        "IWOPDTrainer",
        trl.TrlIWOPDTrainer,
        trl.IWOPDConfig,
        messages,
        {
            "max_length": 128,
            "num_generations": 2,
            "top_p": 1.0,
            "temperature": 0.7,
            "use_teacher_server": True,
        }
        | URL,
        teacher="served",
    ),
    "sdft": Kind(
        "SDFTTrainer", trl.TrlSDFTTrainer, trl.SDFTConfig, told, SELF | TWICE, calls=2, syncs=(0, 2)
    ),
    "sdft_served": Kind("SDFTTrainer", trl.TrlSDFTTrainer, trl.SDFTConfig, told, SELF | LIVE),
    "sdpo": Kind("SDPOTrainer", trl.TrlSDPOTrainer, trl.SDPOConfig, told, SELF, rewarded=True),
    "sdpo_served": Kind(
        "SDPOTrainer",
        trl.TrlSDPOTrainer,
        trl.SDPOConfig,
        told,
        SELF | LIVE | TWICE | {"reprompt_template": "{prompt}{solution}{feedback}"},
        rewarded=True,
        calls=2,  # and yet a sync in each step, before the engine scores
    ),
}


class Recorded:
    """Completions in the order in which they were sampled, and the model's `generate` that gives them again."""

    def __init__(self, trainer: Any) -> None:
        self.rows: list[list[int]] = []
        self.syncs: list[int] = []
        generation = trainer.vllm_generation
        generate, sync = generation.generate, generation.sync_weights

        def record(*args: Any, **kwargs: Any) -> Any:
            turn = generate(*args, **kwargs)
            self.rows += turn[1]
            return turn

        def count() -> None:
            self.syncs.append(trainer.state.global_step)
            sync()

        generation.generate, generation.sync_weights = record, count

    def replay(self, model: PreTrainedModel) -> None:
        left = list(self.rows)

        def generate(input_ids: torch.Tensor, return_dict_in_generate: bool = False, **_: Any) -> Any:
            rows = [torch.tensor(left.pop(0)) for _ in input_ids]
            completions = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
            sequences = torch.cat([input_ids, completions], 1)
            return type("Output", (), {"sequences": sequences}) if return_dict_in_generate else sequences

        model.generate = generate  # type: ignore[method-assign]
        self.left = left


def counted(target: Any, name: str) -> list[int]:
    """A list that grows with each call of a method."""
    method, calls = getattr(target, name), []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    setattr(target, name, count)
    return calls


def lengths(rows: list[list[int]]) -> Callable[..., torch.Tensor]:
    """What IW-OPD infers from the padding, also where a rollout ends with the padding's token."""
    left = [len(row) for row in rows]
    return lambda tokens, _: torch.tensor([left.pop(0) for _ in tokens])
