"""TRL's asynchronous GRPO over a real engine: it samples while the policy trains, and what it samples is known."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.chat_template_utils import qwen3_chat_template

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument, Reason
from tandem.inference.v1 import inference_pb2 as pb
from tests import models
from tests.faults import raw
from tests.integration.calls import idle, stats, until
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, reward
from trainer_service._trl_async import AsyncGRPOConfig, DataCollatorForRollout
from trainer_service.rollout_loop import Turns
from trainer_service.trainers import AsyncGRPOTrainer
from trainer_service.trainers.fresh import Source

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")

TEMPERATURE = 0.8


@pytest.fixture
def service(exact: Service) -> Iterator[Service]:
    before = {thread.name for thread in threading.enumerate()}
    yield exact
    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith(("tandem", "grpo", "rollout", "asyncio"))}
    raw.restore(exact.weights)
    idle(exact)


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
        "vllm_server_timeout": 90,
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
        own = {name: values.pop(name) for name in ("vllm_mode", "peft_config", "callbacks") if name in values}
        self.trainer = trainer = AsyncGRPOTrainer(
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
        self, checkpoint: Path, first: Sequence[pb.Rollout] = ()
    ) -> None:
        """The importance weights stand on them: each token's is that of its version, over all that was sampled from."""
        prompts = {id(answer): prompt for prompt, answer in self.rollouts}
        checked = [*first[:20], *[answer for _, answer in self.rollouts[::8]][:20]]
        model, others = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), [0.0]
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


def test_it_trains_while_the_engine_samples(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorded(
        service,
        checkpoints["llama"],
        tmp_path,
        monkeypatch,
        max_completion_length=100,
        max_steps=3,
        callbacks=[Midway(service)],
    )
    trainer = run.trainer
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.policy_weights.transport == "stream"
    assert_same_bits(service, trainer.model)
    before = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    assert any(
        not torch.equal(a, b) for a, b in zip(before.parameters(), trainer.model.parameters(), strict=True)
    )
    run.assert_each_once()
    assert [len(samples) for _, samples in run.trained] == [8] * 3
    # One update a step, and some of what is trained on was sampled before it, or while it was made.
    versions = [version for version, _ in run.trained]
    assert versions == list(range(versions[0], versions[0] + 3))
    assert logged(trainer, "ratio")[0] == pytest.approx(1, abs=1e-3), "the first step is on its own rollouts"
    assert max(run.staleness()) == 1
    assert max(logged(trainer, "sample/staleness_max")) == 1
    crossed = [answer for _, answer in run.rollouts if len(answer.version_spans) > 1]
    assert crossed, "updates came in the middle of rollouts"
    run.assert_logprobs_are_of_the_versions_they_name(checkpoints["llama"], crossed)
    trainer.close()


@pytest.mark.parametrize(("limit", "budget"), [(0, 0), (1, 300), (2, 0)])
def test_nothing_is_trained_on_that_is_too_old(
    service: Service,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    budget: int,
) -> None:
    run = Recorded(
        service,
        checkpoints["llama"],
        tmp_path,
        monkeypatch,
        max_staleness=limit,
        token_budget=budget,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    trainer, taken = run.trainer, []
    take = Source._next
    monkeypatch.setattr(Source, "_next", lambda source: taken.append(1) or take(source))
    trainer.train()
    assert trainer.state.global_step == 4
    assert max(run.staleness()) <= limit
    run.assert_each_once()
    trained = sum(len(samples) for _, samples in run.trained)
    dropped = sum(logged(trainer, "sample/dropped_stale_total"))
    ahead = 1 if budget else 0  # it did not fit, and would have begun the next micro-batch
    assert trained + dropped + ahead == len(taken), "all others are counted"
    if limit == 0:
        assert logged(trainer, "ratio") == pytest.approx([1] * 4, abs=1e-3)
        assert dropped > 0
    trainer.close()


def test_the_engines_memory_may_be_what_trains(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorded(service, checkpoints["llama"], tmp_path, monkeypatch, vllm_mode="colocate", max_steps=3)
    trainer = run.trainer
    trainer.train()
    assert trainer.policy_weights.aliased
    assert_same_bits(service, trainer.model)
    assert max(run.staleness()) <= 1
    run.assert_each_once()
    trainer.close()
    assert not trainer.policy_weights.aliased


def test_an_adapter_reaches_the_engine_and_leaves_the_base_alone(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = Recorded(service, checkpoints["llama"], tmp_path, monkeypatch, peft_config=lora, max_steps=3)
    trainer = run.trainer
    trainer.train()
    assert_same_bits(service, trainer.model)
    before = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).state_dict()
    base = trainer.model.get_base_model().state_dict()
    name = "model.layers.0.self_attn.{}.weight"
    assert torch.equal(base[name.format("q_proj.base_layer")], before[name.format("q_proj")])
    assert max(run.staleness()) <= 1
    trainer.close()


def broken(completions: list[Any], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def test_a_reward_that_is_none_ends_the_training(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    trainer = AsyncGRPOTrainer(
        str(checkpoints["llama"]),
        broken,
        arguments(tmp_path),
        prompts(),
        processing_class=tokenizer(),
        inference_address=service.address,
    )
    with pytest.raises(RuntimeError, match="no more rollouts") as raised:
        trainer.train()
    assert isinstance(raised.value.__cause__, InvalidArgument)
    assert raised.value.__cause__.reason == Reason.REWARD_INVALID
    trainer.close()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rollout_worker": object()}, "rollout_worker"),
        ({"weight_transfer": object()}, "weight_transfer"),
        ({"vllm_mode": "nowhere"}, "vllm_mode"),
        ({"lora_mode": "both"}, "lora_mode"),
        ({"reward_funcs": "a/model"}, "reward_funcs"),
        ({"args": object()}, "args"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "train_dataset"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(
    tmp_path: Path, values: dict[str, Any], field: str
) -> None:
    given = {
        "model": "no/such-model",
        "reward_funcs": reward,
        "args": arguments(tmp_path),
        "train_dataset": prompts(),
        "inference_address": "unix:///nowhere",
    }
    with pytest.raises(InvalidArgument) as raised:
        AsyncGRPOTrainer(**(given | values))
    assert raised.value.violations[0].field.startswith(field)


def test_several_processes_are_not_trained_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgument, match="one process"):
        AsyncGRPOTrainer("no/such-model", reward, args)


@pytest.mark.slow
def test_training_goes_on_after_kill_9_of_the_service(
    checkpoints: dict[str, Path], socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of rollouts. The new engine is given the weights, and the rollouts are sampled anew."""
    with ExitStack() as lives:

        def start(wait: bool) -> Service:
            return lives.enter_context(
                inference_service(checkpoints["llama"], socket_folder, wait=wait, dtype="float32")
            )

        services = [start(wait=True)]

        class Kill(Midway):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 2:
                    until(self.under_way, 60, "rollouts are under way")
                    services[0].process.kill()
                    services[0].process.wait()
                    services.append(start(wait=False))  # as a supervisor does

            def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None: ...

        run = Recorded(
            services[0],
            checkpoints["llama"],
            tmp_path,
            monkeypatch,
            max_completion_length=80,
            callbacks=[Kill(services[0])],
        )
        trainer = run.trainer
        trainer.train()
        assert trainer.state.global_step == 4
        assert_same_bits(services[1], trainer.model)
        run.assert_each_once()
        assert max(run.staleness()) <= 1
        versions = [version for version, _ in run.trained]
        assert versions == sorted(set(versions)), "they go on as the run's"
        run.assert_logprobs_are_of_the_versions_they_name(checkpoints["llama"])
        trainer.close()
