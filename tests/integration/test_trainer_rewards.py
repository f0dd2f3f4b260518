"""Training by rewards of every kind, over a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tandem.errors import InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import models, rewards
from tests.services import Service
from tests.trainers import arguments, model_of, prompts
from trainer_service import trainers
from trainer_service.rewards import RemoteReward, prepared

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture
def engine(llama: Service) -> Iterator[Service]:
    """The service with the checkpoint's weights, before and after."""
    llama.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    yield llama
    llama.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)


def trainer_of(
    kind: str, engine: Service, checkpoint: Path, folder: Path, reward_funcs: Any, **values: Any
) -> Any:
    return {"grpo": trainers.GRPOTrainer, "rloo": trainers.RLOOTrainer}[kind](
        model_of(checkpoint, torch.bfloat16),
        prepared(reward_funcs),
        arguments(kind, folder, **values),
        prompts(),
        processing_class=models.tokenizer(),
        inference_address=engine.address,
    )


def history(trainer: Any) -> list[dict[str, float]]:
    """What was logged of rewards."""
    found = [
        {name: value for name, value in entry.items() if name.startswith("reward")}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in found if entry]


def test_a_service_gives_what_its_function_gives_here(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path, socket_folder: Path
) -> None:
    with rewards.served("variety", socket_folder) as service:
        remote = RemoteReward(service.address, batch_size=3, name="served")
        trainer = trainer_of("grpo", engine, checkpoints["llama"], tmp_path, [rewards.variety, remote])
        trainer.train()
        trainer.close()
        remote.close()
    steps = history(trainer)
    assert len(steps) == 2
    for step in steps:
        assert step["rewards/variety/std"] > 0
        for figure in ("mean", "std"):
            assert step[f"rewards/served/{figure}"] == step[f"rewards/variety/{figure}"]
        assert step["reward"] == pytest.approx(2 * step["rewards/variety/mean"])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rewards_of_every_kind_are_weighed_together(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    models.tokenizer().save_pretrained(tmp_path / "judge")

    async def half(completions: list[str], **_: Any) -> list[float | None]:
        return [float(i) if i % 2 else None for i in range(len(completions))]

    given = [rewards.variety, half, "get_repetition_penalty_reward(ngram_size=1)", str(tmp_path / "judge")]
    trainer = trainer_of(
        kind, engine, checkpoints["llama"], tmp_path, given, reward_weights=[1.0, 0.5, 2.0, 0.0], max_steps=1
    )
    trainer.train()
    trainer.close()
    (logged,) = history(trainer)
    means = [
        logged[f"rewards/{name}/mean"] for name in ("variety", "half", "repetition_penalty_reward", "judge")
    ]
    assert means[1] == sum([1, 3, 5, 7]) / 4
    assert means[2] <= 0
    assert logged["reward"] == pytest.approx(means[0] + 0.5 * sum([1, 3, 5, 7]) / 8 + 2 * means[2], rel=1e-5)


def test_a_reward_that_is_none_stops_before_anything_is_learnt(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if i == 5 else 1.0 for i in range(len(completions))]

    trainer = trainer_of("grpo", engine, checkpoints["llama"], tmp_path, [rewards.variety, broken])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(
        InvalidArgument, match=r"the reward function broken failed: broken\[5\] is nan"
    ) as caught:
        trainer.train()
    assert caught.value.reason is Reason.REWARD_INVALID
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.close()
