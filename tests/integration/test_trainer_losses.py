"""What GRPO and RLOO learn from the same rollouts is what they learn on TRL's own path."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.services import Service, inference_service
from tests.trainers import (
    arguments,
    logged,
    make,
    model_of,
    prompts,
    reward,
)
from trainer_service import trainers
from trainer_service._trl import TrlGRPOTrainer, TrlRLOOTrainer

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture(scope="module")
def exact(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """A service that computes in float32."""
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoints["llama"], Path(folder), dtype="float32") as service,
    ):
        yield service


class Recording(trainers.GRPOTrainer):
    """Ours, which keeps what was sampled."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        turn = super()._generate_single_turn(*args, **kwargs)
        self.__dict__.setdefault("recorded", []).append(turn[0])
        return turn


class Replaying(TrlGRPOTrainer):
    """TRL's on the path where it generates by itself, with recorded completions in place of what it
    generates."""

    recorded: list[list[list[int]]]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        assert not self.use_vllm
        return self.recorded.pop(0), None


@pytest.mark.parametrize("correction", [False, True], ids=["without_correction", "with_correction"])
def test_loss_is_that_of_trls_own_path_on_the_same_rollouts(
    checkpoints: dict[str, Path], tmp_path: Path, exact: Service, correction: bool
) -> None:
    exact.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    config = {
        "max_steps": 4,
        "num_iterations": 2,
        "beta": 0.1,
        "vllm_importance_sampling_correction": correction,
    }
    ours = make(
        "grpo", exact, model_of(checkpoints["llama"], torch.float32), tmp_path / "a", cls=Recording, **config
    )
    ours.train()
    ours.close()
    theirs = Replaying(
        model_of(checkpoints["llama"], torch.float32),
        reward,
        arguments("grpo", tmp_path / "b", **config),
        prompts(),
        processing_class=models.tokenizer(),
    )
    theirs.recorded = list(ours.recorded)
    theirs.train()
    assert theirs.recorded == []
    losses, expected = logged(ours, "loss"), logged(theirs, "loss")
    assert len(losses) == 4
    assert any(abs(loss) > 1e-3 for loss in losses)
    if correction:  # multiplied by exp(policy - engine), which is 1 within rounding
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert losses == expected
        for ours_parameter, parameter in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(ours_parameter, parameter)


def test_rloo_learns_what_trl_learns_from_the_same_rollouts(
    checkpoints: dict[str, Path], tmp_path: Path, exact: Service
) -> None:
    exact.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    recorded: list[list[list[int]]] = []

    class Recorded(trainers.RLOOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            recorded.append(super()._generate_single_turn(*args, **kwargs))
            return recorded[-1]

    class Replayed(TrlRLOOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            assert not self.use_vllm
            return recorded.pop(0)

    config = {"max_steps": 4, "num_iterations": 2, "beta": 0.1}
    ours = make(
        "rloo", exact, model_of(checkpoints["llama"], torch.float32), tmp_path / "a", cls=Recorded, **config
    )
    ours.train()
    ours.close()
    theirs = Replayed(
        model_of(checkpoints["llama"], torch.float32),
        reward,
        arguments("rloo", tmp_path / "b", **config),
        prompts(),
        processing_class=models.tokenizer(),
    )
    theirs.train()
    assert recorded == []
    for name in ("loss", "grad_norm", "reward"):
        assert logged(ours, name) == logged(theirs, name), name
    for ours_parameter, parameter in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(ours_parameter, parameter)
