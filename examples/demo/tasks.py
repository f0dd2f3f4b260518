"""Sums and differences of two numbers from 0 to 10, none below 0, made and scored by reasoning-gym."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
        config = BasicArithmeticDatasetConfig(
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=1,
            operators=["+", "-"],
            allow_parentheses=False,
            seed=seed,
            size=4000,  # draws, of which a few hundred differ
        )
        self._dataset = BasicArithmeticDataset(config)
        drawn = [Task(entry["question"], entry["answer"]) for entry in self._dataset]
        tasks = list(dict.fromkeys(task for task in drawn if int(task.answer) >= 0))
        self.held_out, self.training = tasks[:HELD_OUT], tasks[HELD_OUT:]

    def reward(self, completion: str, answer: str) -> float:
        """reasoning-gym's score of the last number in `completion`: 1 for the answer, less for more."""
        numbers = _NUMBER.findall(completion)
        return float(self._dataset.score_answer(numbers[-1], {"answer": answer})) if numbers else 0.0
