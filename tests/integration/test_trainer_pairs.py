"""Online DPO, Nash-MD and XPO over a real engine: the right completions, the right loss, the right weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.golden import trl_1_13 as golden
from tests.services import Service
from tests.trainers import PROMPTS, assert_same_bits, logged, reward
from trainer_service import trainers
from trainer_service._trl_experimental import OnlineDPOConfig, TrlOnlineDPOTrainer

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")

KINDS: dict[str, tuple[type, type]] = {
    "online_dpo": (trainers.OnlineDPOTrainer, OnlineDPOConfig),
    "nash_md": (trainers.NashMDTrainer, trainers.NashMDConfig),
    "xpo": (trainers.XPOTrainer, trainers.XPOConfig),
}


@pytest.fixture
def engine(mixed: Service) -> Service:
    """The service with the checkpoint's weights."""
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    return mixed


@pytest.fixture
def pair(checkpoints: dict[str, Path], reference: Path) -> list[Any]:
    """Policy and reference, which differ: those of the engine, in its float32."""
    return [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (checkpoints["llama"], reference)
    ]


def arguments(kind: str, folder: Path, **values: Any) -> Any:
    defaults = golden.SETTINGS | {
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "vllm_server_timeout": 60,
    }
    return KINDS[kind][1](str(folder), **(defaults | values))


def make(kind: str, service: Service, pair: list[Any], folder: Path, **values: Any) -> Any:
    """A trainer of `kind` over `service`; `values` are of its config, but for those it takes itself."""
    own = {
        name: values.pop(name)
        for name in ("peft_config", "judge", "reward_funcs", "eval_dataset", "train_dataset")
        if name in values
    }
    policy, other = pair
    cls = values.pop("cls", KINDS[kind][0])
    return cls(
        **{
            "model": policy,
            "ref_model": other,
            "reward_funcs": None if "judge" in own else reward,
            "args": arguments(kind, folder, **values),
            "train_dataset": Dataset.from_dict({"prompt": [PROMPTS[i % 5] for i in range(12)]}),
            "processing_class": models.tokenizer(),
            "inference_address": service.address,
        }
        | own
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_run_keeps_the_engine_at_the_trainers_bits(
    engine: Service, pair: list[Any], tmp_path: Path, kind: str, mode: str
) -> None:
    before = {name: value.clone() for name, value in pair[0].state_dict().items()}
    trainer = make(kind, engine, pair, tmp_path, vllm_mode=mode, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.policy_weights.transport == {"colocate": "shared", "server": "stream"}[mode]
    # Two micro-batches a step, one weight update for both; Nash-MD and XPO compare the references once.
    assert trainer.vllm_generation.calls == 6 * (1 if kind == "online_dpo" else 2)
    trainer.vllm_generation.sync_weights()
    assert_same_bits(engine, trainer.model)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
    for name in trainer.stats:
        assert len(logged(trainer, name)) == 3, name
    versions = logged(trainer, "tandem/weight_version")[:3]  # the last is of the run's summary
    assert versions == list(range(int(versions[0]), int(versions[0]) + 3))
    trainer.close()


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_and_gradients_are_those_of_trl_1_13(
    engine: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, values = golden.CASES[name]
    trainer = make(kind, engine, golden.pair(tmp_path), tmp_path, **golden.SETTINGS | values)
    drawn = iter(golden.COMPLETIONS)

    def completions(batch: Any, **sampling: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = next(drawn)
        lengths = torch.tensor([[len(row)] for row in rows])
        ids = golden.padded(rows)
        return ids, (torch.arange(ids.shape[1]) < lengths).long()

    monkeypatch.setattr(trainer, "_completions", completions)
    monkeypatch.setattr(trainer, "_compare", lambda *_: None)
    scores = torch.tensor(golden.SCORES).flatten()
    monkeypatch.setattr(trainer, "_calculate_rewards_from_functions", lambda **_: scores.clone())
    found, wanted = golden.measured(trainer), json.loads(golden.FILE.read_text())[name]
    # The losses are differences of sums of about 40, in float32.
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-5)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert found["stats"] == pytest.approx(wanted["stats"], rel=1e-4, abs=1e-5)
    trainer.close()


class Recording(trainers.OnlineDPOTrainer):
    """Online DPO that keeps its rollouts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: list[Any] = []
        super().__init__(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.append(super()._generate(*args, **kwargs))
        return self.kept[-1]


def test_online_dpo_learns_what_trl_learns_from_the_same_rollouts(
    engine: Service, checkpoints: dict[str, Path], pair: list[Any], tmp_path: Path
) -> None:
    """Prompts of different lengths, so that a mask which counts padding would show in the loss."""
    ours = make("online_dpo", engine, pair, tmp_path / "ours", cls=Recording, max_grad_norm=0.0)
    ours.train()
    ours.close()

    class Replaying(TrlOnlineDPOTrainer):
        def _generate(self, *_: Any) -> Any:
            return next(kept)

    kept = iter(ours.kept)
    theirs = Replaying(
        AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32),
        pair[1],
        reward_funcs=reward,
        args=arguments("online_dpo", tmp_path / "theirs", max_grad_norm=0.0),
        train_dataset=ours.train_dataset,
        processing_class=models.tokenizer(),
    )
    theirs.train()
    for name in ("loss", "grad_norm", "rewards/margins", "objective/kl", "objective/scores"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-5, abs=1e-6), name
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_evaluation_counts_apart_and_trains_nothing(engine: Service, pair: list[Any], tmp_path: Path) -> None:
    trainer = make(
        "xpo",
        engine,
        pair,
        tmp_path,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:3]}),
        per_device_eval_batch_size=3,
    )
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    metrics = trainer.evaluate()
    assert all(map(torch.equal, trainer.model.parameters(), before))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert {f"eval_{name}" for name in trainer.stats} <= metrics.keys()
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_loss/dpo"] + metrics["eval_loss/xpo"], rel=1e-4
    )
    assert not any(trainer.stats.values())
    assert not trainer.model.training
    trainer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_takes_the_place_of_rewards(
    engine: Service, pair: list[Any], tmp_path: Path, kind: str
) -> None:
    pairs = []

    class Longest:
        def judge(self, prompts: list[str], completions: list[list[str]], **_: Any) -> list[int]:
            pairs.extend(zip(prompts, completions, strict=True))
            return [0 if len(first) >= len(second) else 1 for first, second in completions]

    trainer = make(kind, engine, pair, tmp_path, judge=Longest(), max_steps=1)
    trainer.train()
    assert len(pairs) == 3
    assert {prompt for prompt, _ in pairs} <= set(PROMPTS)
    if kind == "nash_md":
        wins = sum(len(first) >= len(second) for _, (first, second) in pairs) / 3
        assert logged(trainer, "rewards/probabilities") == pytest.approx([wins])
    trainer.close()


@pytest.mark.parametrize(
    ("kind", "own"), [("online_dpo", None), ("nash_md", "mixture_coef"), ("xpo", "alpha")]
)
def test_schedules_go_by_epochs(
    engine: Service, pair: list[Any], tmp_path: Path, kind: str, own: str | None
) -> None:
    schedules = {"beta": [0.1, 0.2, 0.3]} | ({own: [0.0, 1.0]} if own is not None else {})
    trainer = make(kind, engine, pair, tmp_path, max_steps=-1, num_train_epochs=3, **schedules)
    trainer.train()
    assert logged(trainer, "beta") == [0.1] * 4 + [0.2] * 4 + [0.3] * 4
    if own is not None:
        assert logged(trainer, own) == [0.0] * 4 + [1.0] * 8
    trainer.close()


def test_a_service_without_the_reference_is_refused(
    engine: Service, llama: Service, pair: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        make("nash_md", llama, pair, tmp_path)
    assert refusal.value.reason == Reason.REFERENCE_OFF
    trainer = make("xpo", engine, [pair[0], None], tmp_path)  # then the reference is the policy as it begins
    with pytest.raises(FailedPrecondition) as refusal:
        trainer.train()
    assert refusal.value.reason == Reason.REFERENCE_MISMATCH
    trainer.close()


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        ("online_dpo", {"reward_funcs": None}, "judge"),
        ("online_dpo", {"vllm_mode": "elsewhere"}, "vllm_mode"),
        ("nash_md", {"mixture_coef": 1.5}, "mixture_coef"),
        ("xpo", {"loss_type": "hinge"}, "loss_type"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    engine: Service, pair: list[Any], tmp_path: Path, kind: str, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        make(kind, engine, pair, tmp_path, max_steps=-1, num_train_epochs=1, **values)
    assert refusal.value.violations[0].field == field
