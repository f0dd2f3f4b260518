"""What a training tells of itself: figures of its steps, some of its rollouts, its checkpoints."""

from __future__ import annotations

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce  # type: ignore[import-untyped]
from transformers import TrainerCallback

from trainer_service.jobs.folder import EventLog, JobFolder
from trainer_service.jobs.stopping import Stopped

#: Rollouts told of with each event, and the longest text of one.
SAMPLES = 4
MAX_TEXT = 4000


class Report(TrainerCallback):
    """Writes events, in the main process alone. It also ends the training where it was told to."""

    def __init__(self, folder: JobFolder, events: EventLog | None, stop_file: Path) -> None:
        """`events` is None in other processes than the main one, which alone looks for `stop_file`."""
        self._folder = folder
        self._events = events
        self._stop_file = stop_file
        self._trainer: Any = None
        self._version = 0
        self._sampled = -1
        self._versions: deque[int] = deque()  # of the rows in the trainer's `_logs`
        self._seen: dict[str, tuple[list[Any], list[Any], list[Any], int]] = {}
        #: Whether the training was told to end.
        self.stopping = False
        #: How far it came.
        self.state: Any = None
        #: Whether it has begun.
        self.training = False

    def attach(self, trainer: Any) -> None:
        """Follow a trainer."""
        self._trainer = trainer
        generation = trainer.vllm_generation
        rollouts = generation.rollouts

        @functools.wraps(rollouts)
        def noted(*args: Any, **kwargs: Any) -> Any:
            found = rollouts(*args, **kwargs)
            for rollout in found[:1]:
                self._version = max((span.weight_version for span in rollout.version_spans), default=0)
            return found

        generation.rollouts = noted
        if (logs := getattr(trainer, "_logs", None)) is None:
            return
        self._versions = deque(maxlen=logs["prompt"].maxlen)
        generate = trainer._generate_and_score_completions

        @functools.wraps(generate)
        def kept(inputs: Any) -> Any:
            made = generate(inputs)  # it logs what all ranks sampled in it
            self._versions.extend([self._version] * (len(inputs) * trainer.accelerator.num_processes))
            return made

        trainer._generate_and_score_completions = kept

    def record(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        """A reward function, whose last rollouts are kept: not every algorithm of TRL's keeps them itself."""
        name = getattr(reward, "__name__", type(reward).__name__)
        if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
            return reward  # TRL awaits these together

        @functools.wraps(reward, updated=())
        def recorded(**given: Any) -> Any:
            values = reward(**given)
            rows = slice(SAMPLES)
            self._seen[name] = (
                given["prompts"][rows],
                given["completions"][rows],
                values[rows],
                self._version,
            )
            return values

        recorded.__name__ = name
        return recorded

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._told():
            raise Stopped
        self.training = True
        if self._events is not None:
            self._events.write("RUN", {"step": state.global_step, "max_steps": state.max_steps})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._told():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._events is None:
            return
        values = {name: float(value) for name, value in (logs or {}).items() if _is_number(value)}
        where = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        self._events.write("METRICS", where | {"values": values})
        if state.global_step != self._sampled and (samples := self._samples()):
            self._sampled = (
                state.global_step
            )  # an evaluation and the training's end are logged at a step, too
            self._events.write("SAMPLES", {"step": state.global_step, "samples": samples})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._events is None:
            return
        for found in self._folder.checkpoints():
            if found.step == state.global_step:
                body = {
                    "step": found.step,
                    "path": str(found.path),
                    "bytes": found.nbytes,
                    "time": found.time,
                }
                self._events.write("CHECKPOINT", body)

    def _told(self) -> bool:
        """Whether the training was told to end. All ranks ask together, and hear the same."""
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1:
            told = self.stopping or (self._events is not None and self._stop_file.exists())
            flag = torch.tensor(int(told), device=accelerator.device)
            self.stopping = bool(reduce(flag, "sum").item())
        return self.stopping

    def _samples(self) -> list[dict[str, Any]]:
        logs = getattr(self._trainer, "_logs", None)
        if logs and logs.get("prompt"):
            rewards = {name: list(values) for name, values in logs["rewards"].items()}
            prompts, completions = list(logs["prompt"]), list(logs["completion"])
            advantages: list[Any] | None = list(logs.get("advantages", ())) or None
            versions = list(self._versions)
            versions = [self._version] * (len(prompts) - len(versions)) + versions
        elif self._seen:
            prompts, completions, _, version = next(iter(self._seen.values()))
            rewards = {name: values for name, (_, _, values, _) in self._seen.items()}
            advantages, versions = None, [version] * len(prompts)
        else:
            return []
        found = []
        for i in range(min(SAMPLES, len(prompts))):
            earned = {name: float(values[i]) for name, values in rewards.items() if _is_number(values[i])}
            sample = {
                "prompt": _text(prompts[i]),
                "completion": _text(completions[i]),
                "rewards": earned,
                "weight_version": versions[i],
            }
            if advantages is not None and _is_number(advantages[i]):
                sample["advantage"] = float(advantages[i])
            found.append(sample)
        return found


def _is_number(value: Any) -> bool:
    # A JSON line has no infinity, and a figure that is none tells nothing.
    return isinstance(value, int | float) and math.isfinite(value)


def _text(turn: Any) -> str:
    """A prompt or a completion to read: text, or a chat's messages one below the other."""
    if isinstance(turn, str):
        return turn[:MAX_TEXT]
    lines = [f"{message.get('role', '')}: {message.get('content', '')}" for message in turn]
    return "\n".join(lines)[:MAX_TEXT]
