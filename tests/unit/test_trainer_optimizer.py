"""Parameters in bfloat16 learn what float32's do, unless that is switched off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optimi import AdamW
from transformers import TrainingArguments

from benchmarks import bf16
from tandem.errors import InvalidArgument
from trainer_service.trainers.optimizer import asked_for

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|torch|datasets)")


@pytest.fixture(scope="module")
def start() -> Any:
    return bf16.begun(40)


def learner(model: Any, folder: Path, **values: Any) -> bf16.Learner:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-5,
        "max_steps": 6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **(defaults | values))
    return bf16.Learner(model, arguments, train_dataset=bf16.rows(5, 64, seed=2))


def test_losses_follow_float32s(start: Any) -> None:
    found = bf16.compare(start, 2e-5, 30)
    plain, summed = (bf16.apart(found[name], found["float32"]) for name in list(found)[1:])
    assert summed < plain / 2


def kind(trainer: bf16.Learner) -> type:
    return type(trainer.create_optimizer())


def test_what_switches_it(start: Any, tmp_path: Path) -> None:
    low = copy.deepcopy(start).to(torch.bfloat16)
    assert kind(learner(low, tmp_path)) is AdamW
    assert kind(learner(low, tmp_path, optim_args="kahan_sum=false")) is torch.optim.AdamW
    assert kind(learner(start, tmp_path)) is torch.optim.AdamW
    assert kind(learner(start, tmp_path, optim_args="kahan_sum=true")) is torch.optim.AdamW
    assert kind(learner(low, tmp_path, optim="sgd")) is torch.optim.SGD
    for parameter in low.parameters():
        parameter.requires_grad_(False)
    low.model.norm.weight.requires_grad_(True).data = low.model.norm.weight.data.float()
    assert kind(learner(low, tmp_path)) is torch.optim.AdamW, "what is trained is in float32"


def test_it_has_the_arguments_of_adamw(start: Any, tmp_path: Path) -> None:
    values = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.1}
    made = learner(copy.deepcopy(start).to(torch.bfloat16), tmp_path, **values).create_optimizer()
    decayed, rest = made.param_groups
    assert [(g["beta1"], g["beta2"], g["eps"], g["lr"]) for g in made.param_groups] == [
        (0.8, 0.95, 1e-7, 2e-5)
    ] * 2
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, None), ("", None), ("a=b", None), ("a=b, kahan_sum=TRUE", True), ({"kahan_sum": False}, False)],
)
def test_the_flag(given: Any, wanted: bool | None) -> None:
    assert asked_for(given) is wanted


def test_a_flag_that_says_nothing_is_named() -> None:
    with pytest.raises(InvalidArgument, match="'maybe'") as raised:
        asked_for("kahan_sum=maybe")
    assert [violation.field for violation in raised.value.violations] == ["optim_args"]


def test_a_resumed_run_goes_on_bit_for_bit(start: Any, tmp_path: Path) -> None:
    whole, halves = (copy.deepcopy(start).to(torch.bfloat16) for _ in range(2))
    learner(whole, tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    trainer = learner(halves, tmp_path / "rest")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name]), name
    trainer.train(
        resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3")
    )  # once more, with the same trainer
    assert all(map(torch.equal, whole.parameters(), halves.parameters()))
    states = [trainer.optimizer.state[parameter] for parameter in halves.parameters()]
    assert any(state["kahan_comp"].any() for state in states)


def test_the_other_adamws_checkpoint_is_refused(start: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(start).to(torch.bfloat16)
    values = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    learner(model, tmp_path, **values, optim_args="kahan_sum=false").train()
    with pytest.raises(InvalidArgument, match="kahan_sum=false"):
        learner(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
