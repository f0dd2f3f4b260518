"""Sums and differences of two numbers from 0 to 10, none below 0, made and scored by reasoning-gym."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoning_gym.arithmetic.basic_arithmetic import (  # type: ignore[import-untyped]
    BasicArithmeticDataset,
    BasicArithmeticDatasetConfig,
)

INSTRUCTION = "Answer with the number only."
#: Room for the model to write the whole sum, which is how it gets it right: "10 + 10 = 20".
MAX_TOKENS = 12
HELD_OUT = 64
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Task:
    """A question, and the number that answers it."""

    question: str
    answer: str

    @property
    def chat(self) -> list[dict[str, str]]:
        """What the model is told."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.question}]


class Tasks:
    """All 187 tasks in an order that the seed gives. Those held out are never trained on."""

    def __init__(self, seed: int) -> None:
        drawn = [Task(entry["question"], entry["answer"]) for entry in _drawn(seed, 4000)]
        tasks = list(dict.fromkeys(task for task in drawn if int(task.answer) >= 0))
        self.held_out, self.training = tasks[:HELD_OUT], tasks[HELD_OUT:]

    def write(self, path: Path) -> None:
        """Write those to train on, for a job's `dataset.json_lines`: a chat as `prompt`, and its `answer`."""
        rows = [{"prompt": task.chat, "answer": task.answer} for task in self.training]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """What rollouts earn. A job names it `examples.demo.tasks:reward`."""
    return [score(said[-1]["content"], right) for said, right in zip(completions, answer, strict=True)]


def score(completion: str, answer: str) -> float:
    """reasoning-gym's score of the last number in `completion`: 1 for the answer, less for more."""
    numbers = _NUMBER.findall(completion)
    return float(_SCORER.score_answer(numbers[-1], {"answer": answer})) if numbers else 0.0


def _drawn(seed: int, size: int) -> Any:
    """So many draws, of which a few hundred differ."""
    config = BasicArithmeticDatasetConfig(
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=1,
        operators=["+", "-"],
        allow_parentheses=False,
        seed=seed,
        size=size,
    )
    return BasicArithmeticDataset(config)


_SCORER = _drawn(0, 1)
