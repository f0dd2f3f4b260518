"""Asynchronous training runs that are small, and what they were given."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.chat_template_utils import qwen3_chat_template

from tandem.engine.v1 import engine_pb2
from tandem.inference.v1 import inference_pb2 as pb
from tests import models
from tests.integration.calls import stats, until
from tests.services import Service
from tests.trainers import reward
from trainer_service._trl_async import AsyncGRPOConfig, DataCollatorForRollout
from trainer_service.rollout_loop import Turns
from trainer_service.trainers import AsyncGRPOTrainer

TEMPERATURE = 0.8


def tokenizer() -> PreTrainedTokenizerFast:
    made = models.tokenizer()
    made.chat_template = qwen3_chat_template
    return made


def prompts(rows: int = 16) -> Dataset:
    texts = ["ab", "cde", "x", "yy"]
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": texts[i % len(texts)]}] for i in range(rows)]}
    )


def arguments(folder: Path, **values: Any) -> AsyncGRPOConfig:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_inflight_tasks": 16,
        "max_staleness": 1,
        "max_steps": 4,
        "token_budget": 0,
        "learning_rate": 1e-3,
        "temperature": TEMPERATURE,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "vllm_server_timeout": 240,
    }
    return AsyncGRPOConfig(str(folder), **(defaults | values))


class Recorded:
    """A trainer, and what it was given: rollouts, the policy of each version, and what each step trained on."""

    def __init__(
        self, service: Service, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
    ) -> None:
        self.rollouts: list[tuple[list[int], pb.Rollout]] = []
        self.policies: dict[int, dict[str, torch.Tensor]] = {}
        self.trained: list[tuple[int, list[dict[str, Any]]]] = []  # (version, samples) of each step
        own = {
            name: values.pop(name)
            for name in ("vllm_mode", "lora_mode", "peft_config", "callbacks")
            if name in values
        }
        cls = values.pop("cls", AsyncGRPOTrainer)
        self.trainer = trainer = cls(
            str(checkpoint),
            reward,
            arguments(folder, **values),
            prompts(),
            processing_class=tokenizer(),
            inference_address=service.address,
            **own,
        )
        for callback in own.get("callbacks", []):
            callback.samples = trainer.rollout_queue
        sample, collate, sync = Turns.sample, DataCollatorForRollout.torch_call, trainer.policy_weights.sync

        def recorded(turns: Turns, prompt_ids: list[int], rollout: Any) -> pb.Rollout:
            answer = sample(turns, prompt_ids, rollout)
            if answer.token_ids:
                self.rollouts.append((prompt_ids, answer))
            return answer

        def collated(collator: Any, examples: list[Any]) -> Any:
            samples = [one for row in examples[0] for one in row.samples]
            self.trained.append((trainer.policy_weights.weight_version, samples))
            return collate(collator, examples)

        def synced() -> None:
            sync()
            state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
            self.policies[trainer.policy_weights.weight_version] = {
                name: tensor.detach().clone() for name, tensor in state.items()
            }

        monkeypatch.setattr(Turns, "sample", recorded)
        monkeypatch.setattr(DataCollatorForRollout, "torch_call", collated)
        monkeypatch.setattr(trainer.policy_weights, "sync", synced)

    def assert_each_once(self) -> None:
        """What is trained on is what was sampled, each rollout once, with the logprobs that it was sampled with."""
        left = Counter(_key(prompt, answer) for prompt, answer in self.rollouts)
        groups: Counter[int] = Counter()
        for sample in (sample for _, step in self.trained for sample in step):
            ids, mask = sample["input_ids"].tolist(), sample["completion_mask"].astype(bool)
            completion = int(mask.sum())
            key = (tuple(ids), tuple(sample["old_log_probs"][mask].tolist()))
            assert mask[-completion:].all()
            assert left[key] > 0, "it was not sampled, or trained on before"
            left[key] -= 1
            groups[sample["group_id"]] += 1
        assert max(groups.values()) <= 4

    def assert_logprobs_are_of_the_versions_they_name(
        self,
        checkpoint: Path,
        first: Sequence[pb.Rollout] = (),
        wrap: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        """The importance weights stand on them: each token's is that of its version, over all that was sampled from."""
        prompts = {id(answer): prompt for prompt, answer in self.rollouts}
        checked = [*first[:20], *[answer for _, answer in self.rollouts[::8]][:20]]
        model = wrap(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)).eval()
        others = [0.0]
        for version, state in self.policies.items():
            model.load_state_dict(state)
            for answer in checked:
                prompt, done = prompts[id(answer)], 0
                expected = logprobs(model, [*prompt, *answer.token_ids])[len(prompt) - 1 :]
                for span in answer.version_spans:
                    here = torch.tensor(answer.logprobs[done : done + span.num_tokens])
                    distance = float((here - expected[done : done + span.num_tokens]).abs().max())
                    if span.weight_version == version:
                        assert distance < 2e-3
                    else:
                        others.append(distance)
                    done += span.num_tokens
        assert max(others) > 0.1, "other versions would be seen"

    def staleness(self) -> list[int]:
        return [version - s["oldest"] for version, step in self.trained for s in step]


def _key(prompt: list[int], answer: pb.Rollout) -> tuple[tuple[int, ...], tuple[float, ...]]:
    single = np.asarray(answer.logprobs, dtype=np.float32)
    return (*prompt, *answer.token_ids), tuple(single.tolist())


@torch.no_grad()
def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of each token after the first, at the temperature that is sampled at."""
    logits = model(torch.tensor([ids])).logits[0].float() / TEMPERATURE
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


class Midway(TrainerCallback):
    """Has each update come while rollouts are under way. TRL's own callback, which updates, comes after this."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.samples: queue.Queue[Any] = queue.Queue()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        until(self.under_way, 60, "rollouts are under way")
        self._signal(signal.SIGSTOP)
        self._thawing = threading.Thread(target=self._thaw)
        self._thawing.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._thawing.join()

    def under_way(self) -> bool:
        with suppress(queue.Empty):  # where enough are ready, none are made: these are nobody's
            self.samples.get_nowait()
        return bool(stats(self.service).num_running)

    def _thaw(self) -> None:
        """What the engine finds first is that it is to stop."""
        try:
            until(lambda: stats(self.service).state == engine_pb2.SERVING_STATE_PAUSED, 60, "an update came")
        finally:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.service.children():
            os.kill(pid, number)
