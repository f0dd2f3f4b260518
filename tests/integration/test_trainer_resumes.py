"""What a run that goes on from a checkpoint needs beside what transformers keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.services import Service
from tests.trainers import arguments, model_of, prompts, reward
from trainer_service import trainers
from trainer_service.trainers.groups import EpochSampler

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")

STEPS, SAVED = 6, 3


class Save(TrainerCallback):
    """Saves a checkpoint within the rollouts of a generation, after an evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == SAVED


class Recorded(trainers.GRPOTrainer):
    """Ours, which keeps the rollouts of each call."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        turn = super()._generate_single_turn(*args, **kwargs)
        self.__dict__.setdefault("turns", []).append((self.state.global_step, self._evaluating, turn[0]))
        return turn


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_reference_that_changes_rollouts_that_wait_and_an_evaluation(
    llama: Service, checkpoints: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    def run(folder: Path, *, evaluate: bool) -> Any:
        values = {"eval_strategy": "steps", "eval_steps": 1} if evaluate else {}
        return Recorded(
            model_of(checkpoints["llama"], torch.bfloat16),
            reward,
            arguments(
                "grpo",
                folder,
                vllm_mode=mode,
                max_steps=STEPS,
                num_iterations=2,
                steps_per_generation=2,
                beta=0.1,
                sync_ref_model=True,
                ref_model_sync_steps=2,
                save_strategy="steps",
                save_steps=100,
                per_device_eval_batch_size=4,
                **values,
            ),
            prompts(8),
            eval_dataset=prompts(2) if evaluate else None,
            processing_class=models.tokenizer(),
            callbacks=[Save()],
            inference_address=llama.address,
        )

    runs = []
    for name, evaluate, checkpoint in (("whole", True, None), ("plain", False, None), ("cut", True, "whole")):
        llama.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
        trainer = run(tmp_path / name, evaluate=evaluate)
        where = None if checkpoint is None else str(tmp_path / checkpoint / f"checkpoint-{SAVED}")
        trainer.train(resume_from_checkpoint=where)
        trainer.close()
        runs.append(trainer)
    whole, plain, cut = runs
    assert [step for step, evaluating, _ in cut.turns if not evaluating] == [4]
    assert [turn for turn in whole.turns if not turn[1]] == plain.turns, "an evaluation changes no seed"
    assert cut.turns == [turn for turn in whole.turns if turn[0] > SAVED]
    for name in ("loss", "grad_norm", "kl", "reward", "eval_loss", "eval_kl"):
        found = [e[name] for e in cut.state.log_history if name in e and e["step"] > SAVED]
        assert found == [e[name] for e in whole.state.log_history if name in e and e["step"] > SAVED], name
        assert found
    for model in ("model", "ref_model"):
        pairs = zip(getattr(cut, model).parameters(), getattr(whole, model).parameters(), strict=True)
        assert all(torch.equal(parameter, expected) for parameter, expected in pairs), model


def test_a_sampler_gives_a_resumed_run_the_order_of_its_epoch() -> None:
    def sampler() -> RepeatSampler:
        return RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=5)  # type: ignore[arg-type]

    theirs = sampler()
    expected = [list(theirs) for _ in range(4)]  # type: ignore[call-overload]
    assert len({tuple(order) for order in expected}) == 4
    for first in range(4):
        now = SimpleNamespace(epoch=first)
        ours = EpochSampler(sampler(), lambda now=now: now.epoch)  # type: ignore[misc]
        assert len(ours) == len(theirs)
        for epoch in range(first, 4):
            now.epoch = epoch
            assert list(ours) == expected[epoch]
