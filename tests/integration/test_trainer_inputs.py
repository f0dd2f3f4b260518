"""What cannot be is an error that names it, before a model is loaded where it can be known then: each algorithm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig

from tandem.errors import InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.integration.test_trainer_pairs import KINDS as PAIRS
from tests.integration.test_trainer_pairs import arguments as pair_arguments
from tests.runs import ALL, GROUPS, Run
from tests.services import Service
from tests.trainers import PROMPTS, arguments, prompts, reward
from trainer_service import trainers
from trainer_service._trl import GRPOConfig, RLOOConfig
from trainer_service._trl_experimental import GMPOConfig, OnlineDPOConfig

pytestmark = [
    pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)"),
    pytest.mark.filterwarnings("ignore:You are using '.*', which is an experimental feature"),  # TRL's notice
]

TRAINERS: dict[str, Any] = GROUPS | {kind: trainer for kind, (trainer, _) in PAIRS.items()}
CONFIGS: dict[str, Any] = {
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "online_dpo": OnlineDPOConfig,
    "nash_md": trainers.NashMDConfig,
    "xpo": trainers.XPOConfig,
    "gmpo": GMPOConfig,  # GRPO's, and more
}
OWN_FIELDS = {"nash_md": "mixture_coef", "xpo": "alpha"}


def configuration(kind: str, folder: Path, **values: Any) -> Any:
    return arguments(kind, folder, **values) if kind in GROUPS else pair_arguments(kind, folder, **values)


def made_of_nothing(kind: str, folder: Path, **values: Any) -> Any:
    """A trainer whose model and service do not exist: what is refused is so before either is looked for."""
    given = {"reward_funcs": reward, "args": configuration(kind, folder), "train_dataset": prompts()}
    return TRAINERS[kind](
        model="no such model",
        processing_class=models.tokenizer(),
        inference_address="unix:///nowhere",
        **(given | values),
    )


def refused(call: Callable[[], Any]) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refusal:
        call()
    return refusal.value


@pytest.mark.parametrize(("kind", "other"), [(k, o) for k in ALL for o in CONFIGS if k != o])
def test_the_configuration_of_another_algorithm(tmp_path: Path, kind: str, other: str) -> None:
    """Also one that has all that this one has, and fields that would not be read."""
    args = CONFIGS[other](str(tmp_path), use_cpu=True, bf16=False)
    error = refused(lambda: made_of_nothing(kind, tmp_path, args=args))
    assert error.violations[0].field == "args"
    assert type(args).__name__ in error.message


@pytest.mark.parametrize(("kind", "other"), [(k, o) for k in ALL for o in OWN_FIELDS if k != o])
def test_a_field_of_another_algorithm(tmp_path: Path, kind: str, other: str) -> None:
    with pytest.raises(TypeError, match=OWN_FIELDS[other]):
        CONFIGS[kind](str(tmp_path), **{OWN_FIELDS[other]: 0.5})


def test_a_users_own_configuration_builds_on_an_algorithms(tmp_path: Path) -> None:
    class Own(GRPOConfig):
        pass

    args = Own(str(tmp_path), use_cpu=True, bf16=False)
    error = refused(
        lambda: made_of_nothing("grpo", tmp_path, args=args, train_dataset=Dataset.from_dict({"q": []}))
    )
    assert error.violations[0].field == "train_dataset"


@pytest.mark.parametrize("kind", ALL)
def test_a_dataset_without_prompts(tmp_path: Path, kind: str) -> None:
    other = Dataset.from_dict({"question": ["a"]})
    for values, field in (
        ({"train_dataset": other}, "train_dataset"),
        ({"eval_dataset": other}, "eval_dataset"),
        ({"eval_dataset": {"one": prompts(), "two": other}}, "eval_dataset['two']"),
    ):
        error = refused(lambda values=values: made_of_nothing(kind, tmp_path, **values))  # type: ignore[misc]
        assert error.violations[0].field == field
        assert "question" in error.message


@pytest.mark.parametrize("kind", PAIRS)
def test_a_judge_and_a_reward_model(tmp_path: Path, kind: str) -> None:
    tiny = LlamaConfig(**models.SMALL, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(tiny)
    error = refused(lambda: made_of_nothing(kind, tmp_path, judge=object(), reward_funcs=model))
    assert error.violations[0].field == "judge"


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, "beta") for kind in PAIRS] + [("nash_md", "mixture_coef"), ("xpo", "alpha")],
)
@pytest.mark.parametrize("schedule", [[], [0.1, 0.2, 0.3]])
def test_a_schedule_of_the_wrong_length(tmp_path: Path, kind: str, field: str, schedule: list[float]) -> None:
    args = configuration(kind, tmp_path, max_steps=-1, num_train_epochs=2, **{field: schedule})
    error = refused(lambda: made_of_nothing(kind, tmp_path, args=args))
    assert error.violations[0].field == field


@pytest.fixture
def run(mixed: Service, checkpoints: dict[str, Path], reference: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes a Run of a kind, over the service with the checkpoint's weights."""
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    return lambda kind, **values: Run(kind, mixed, [checkpoints["llama"], reference], tmp_path, **values)


@pytest.mark.parametrize("kind", ALL)
def test_another_tokenizer(run: Callable[..., Run], kind: str) -> None:
    other = models.tokenizer()
    other.add_tokens(["qu"])
    assert refused(lambda: run(kind, processing_class=other)).violations[0].field == "processing_class"


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("wrong", [None, float("nan"), "count"])
def test_a_reward_that_is_none(run: Callable[..., Run], kind: str, wrong: float | str | None) -> None:
    """It stops the run before anything is learnt."""

    def broken(completions: list[str], **_: Any) -> list[Any]:
        rewards = [1.0] * len(completions)
        return rewards[1:] if wrong == "count" else [wrong, *rewards[1:]]

    made = run(kind, reward_funcs=broken)
    before = [parameter.clone() for parameter in made.trainer.model.parameters()]
    error = refused(made.trainer.train)
    assert error.reason == Reason.REWARD_INVALID
    assert "broken" in error.message
    assert all(map(torch.equal, made.trainer.model.parameters(), before))
    made.trainer.close()


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("kind", ["nash_md", "xpo"])
def test_images_for_a_reference_that_cannot_see(tmp_path: Path, kind: str, column: str) -> None:
    dataset = Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS})
    error = refused(lambda: made_of_nothing(kind, tmp_path, train_dataset=dataset))
    assert error.violations[0].field == "train_dataset"
    assert "cannot see" in error.message
