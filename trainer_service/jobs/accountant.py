"""Keeps a job's account of rollouts, in the file that `trainer_service.jobs.account` reads."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from trainer_service.account import Account
from trainer_service.jobs.folder import JobFolder, LineLog


class Accountant(TrainerCallback):
    """Writes the account of one rank, a line for each step, before the step's checkpoint."""

    def __init__(self, folder: JobFolder, attempt: int, trainer: Any) -> None:
        log = LineLog(folder.rollouts_file)
        who = {"attempt": attempt, "rank": trainer.accelerator.process_index}
        self._account = trainer.account = Account(lambda line: log.append(who | dict(line)))
        self._passes = getattr(trainer, "passes", 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._account.begin(state.global_step, self._passes)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._account.step_done(state.global_step)
