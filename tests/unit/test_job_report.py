"""What a training tells of its rollouts: each with the weight version that sampled it."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.inference.v1 import inference_pb2 as pb
from tests.jobs import spec
from trainer_service.jobs.folder import EventLog, JobFolder
from trainer_service.jobs.report import Report


class Trainer:
    """Generates as TRL's trainers do: it logs the last four rollouts, whichever calls they came from."""

    def __init__(self, logs: bool) -> None:
        self.version = 0
        self.accelerator = SimpleNamespace(num_processes=1)
        self.vllm_generation = SimpleNamespace(rollouts=self._rollouts)
        if logs:
            rewards: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=4))
            self._logs = {"prompt": deque(maxlen=4), "completion": deque(maxlen=4), "rewards": rewards}
            self._logs["advantages"] = deque(maxlen=4)

    def _rollouts(self, prompts: list[str]) -> list[pb.Rollout]:
        span = pb.VersionSpan(weight_version=self.version, num_tokens=1)
        return [pb.Rollout(token_ids=[1], version_spans=[span]) for _ in prompts]

    def _generate_and_score_completions(self, inputs: list[str]) -> None:
        self.version += 1
        self.vllm_generation.rollouts(inputs)
        self._logs["prompt"].extend(inputs)
        self._logs["completion"].extend([f"by {self.version}"] * len(inputs))
        self._logs["rewards"]["score"].extend([1.0] * len(inputs))


@pytest.fixture
def report(tmp_path: Path) -> Report:
    folder = JobFolder(tmp_path / "job")
    folder.make(spec())
    return Report(folder, EventLog(folder, 1), folder.stop_file(1))


def test_samples_of_several_calls_have_each_their_own_version(report: Report) -> None:
    trainer = Trainer(logs=True)
    report.attach(trainer)
    seen = []
    for inputs in (["a", "b", "c", "d"], ["e", "f"], ["g"]):  # a batch, and smaller ones of an evaluation
        trainer._generate_and_score_completions(inputs)
        seen.append([(s["completion"], s["weight_version"]) for s in report._samples()])
    assert seen == [
        [("by 1", 1)] * 4,
        [("by 1", 1), ("by 1", 1), ("by 2", 2), ("by 2", 2)],
        [("by 1", 1), ("by 2", 2), ("by 2", 2), ("by 3", 3)],
    ]


def test_samples_of_a_trainer_that_keeps_none_have_the_version_of_their_reward_call(report: Report) -> None:
    trainer = Trainer(logs=False)
    report.attach(trainer)

    def score(**given: Any) -> list[float]:
        return [1.0 for _ in given["prompts"]]

    recorded = report.record(score)
    trainer.version = 3
    trainer.vllm_generation.rollouts(["a"])
    recorded(prompts=["a"], completions=["by 3"])
    trainer.version = 4
    trainer.vllm_generation.rollouts(["b"])  # whose reward is not there yet
    assert [(s["completion"], s["weight_version"]) for s in report._samples()] == [("by 3", 3)]
