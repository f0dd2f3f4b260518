"""TRL's asynchronous GRPO over a real engine: it samples while the policy trains, and what it samples is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2
from tests.asynchronous import Midway, Recorded, arguments, prompts, tokenizer
from tests.faults import raw
from tests.integration.calls import idle, until
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, reward
from trainer_service._trl_async import TrlAsyncGRPOTrainer
from trainer_service.trainers import AsyncGRPOTrainer
from trainer_service.trainers.fresh import Source
from trainer_service.trainers.tree_attention import register_plain_attention

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture
def service(exact: Service) -> Iterator[Service]:
    before = {thread.name for thread in threading.enumerate()}
    yield exact
    left = (
        {thread.name for thread in threading.enumerate()} - before - {"tandem-heart"}
    )  # one of each process
    assert not {name for name in left if name.startswith(("tandem", "grpo", "rollout", "asyncio"))}
    raw.restore(exact.weights)
    idle(exact)


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


class Theirs(AsyncGRPOTrainer):
    """With TRL's own loader."""

    get_train_dataloader = TrlAsyncGRPOTrainer.get_train_dataloader


def test_trls_own_loader_trains_on_what_is_older_than_it_is_told(
    exact: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches a micro-batch before the step, and so before the update, that comes before the one for it."""
    run = Recorded(
        exact, checkpoints["llama"], tmp_path, monkeypatch, cls=Theirs, max_staleness=0, max_steps=3
    )
    register_plain_attention()
    trainer, versions = run.trainer, []
    step = trainer.training_step
    monkeypatch.setattr(
        trainer,
        "training_step",
        lambda *given: versions.append(trainer.policy_weights.weight_version) or step(*given),
    )
    trainer.train()
    taken = [{s["group_id"] for s in samples} for _, samples in run.trained]
    fetched = [version for version, _ in run.trained]
    assert len(versions) == 3
    assert all(taken)
    assert [version - then for version, then in zip(versions, fetched, strict=False)] == [0, 1, 1]
    trainer.close()
    raw.restore(exact.weights)


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


def test_an_adapter_may_reach_the_engine_alone(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = Recorded(
        service,
        checkpoints["llama"],
        tmp_path,
        monkeypatch,
        peft_config=lora,
        lora_mode="adapter",
        max_steps=3,
        learning_rate=0.05,
    )
    trainer = run.trainer
    base = service.weights.GetWeightVersion(
        weights_pb2.GetWeightVersionRequest(include_digest=True), timeout=30
    )
    trainer.train()
    now = service.weights.GetWeightVersion(
        weights_pb2.GetWeightVersionRequest(include_digest=True), timeout=30
    )
    assert now.digest == base.digest, "the engine's own weights stay"
    assert now.weight_version == base.weight_version + 4
    assert logged(trainer, "ratio")[0] == pytest.approx(1, abs=1e-3)
    assert max(run.staleness()) <= 1
    run.assert_each_once()
    run.assert_logprobs_are_of_the_versions_they_name(
        checkpoints["llama"], wrap=lambda model: get_peft_model(model, lora)
    )
    trainer.close()
    service.engine.UnloadLora(engine_pb2.UnloadLoraRequest(name="policy"), timeout=30)


class Guess:
    """An environment that says what to do, and rewards it."""

    def reset(self, **_: Any) -> str:
        return " Write much."

    def get_reward(self) -> float:
        return float(id(self) % 7)


def test_environments_own_the_reward(service: Service, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    trainer = AsyncGRPOTrainer(
        str(checkpoints["llama"]),
        args=arguments(tmp_path, max_steps=2, report_to=[]),
        train_dataset=prompts(),
        processing_class=tokenizer(),
        environment_factory=Guess,
        inference_address=service.address,
    )
    trainer.train()
    assert len(logged(trainer, "rewards/Guess")) == 2
    trainer.close()


def test_a_run_goes_on_from_its_checkpoint(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Recorded(
        service, checkpoints["llama"], tmp_path, monkeypatch, max_steps=2, save_strategy="steps", save_steps=2
    )
    first.trainer.train()
    first.trainer.close()
    again = Recorded(service, checkpoints["llama"], tmp_path, monkeypatch, max_steps=3)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer = again.trainer
    assert trainer.state.global_step == 3
    assert len(again.trained) == 1
    assert trainer.rollout_worker._loop_kwargs["dataset_start_index"] > 0, (
        "it does not begin with the first prompt"
    )
    earliest = min(again.policies)
    assert earliest > max(version for version, _ in first.trained), "versions go on"
    name = "model.layers.0.self_attn.q_proj.weight"
    last = first.trainer.model.state_dict()[name]
    assert torch.equal(again.policies[earliest][name], last), "the checkpoint is what is sampled from"
    assert_same_bits(service, trainer.model)
    trainer.close()


def broken(completions: list[Any], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def test_a_reward_that_is_none_ends_the_training(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer hears why as soon as it hears that, however long TRL's loop then takes to log it."""
    log = "trl.experimental.async_grpo.async_rollout_worker.logger.exception"
    monkeypatch.setattr(log, lambda *said: time.sleep(2))
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
        ({"args": arguments(Path("out"), max_staleness=-1)}, "args.max_staleness"),
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
