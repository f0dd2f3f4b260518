"""What a trainer is given, checked before a model is loaded."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from tandem.errors import invalid
from trainer_service.rewards import check_rows
from trainer_service.rewards.checks import name_of
from trainer_service.trainers.agreement import agree, held

#: Where configurations of algorithms are from. A class of a user's own may add to one of them.
_LIBRARIES = ("trl", "trainer_service")


def check_config(args: Any, expected: type) -> None:
    """Refuse another algorithm's configuration, also one that builds on this one's: its fields would not be read.

    Raises:
        InvalidArgument: names `args`.
    """
    kind = type(args)
    if not issubclass(kind, expected) or (
        kind is not expected and kind.__module__.partition(".")[0] in _LIBRARIES
    ):
        article = "an" if expected.__name__[0] in "AEIOX" else "a"
        raise invalid("args", f"must be {article} {expected.__name__}, is {kind.__name__}")


def columns_of(dataset: Any, evaluated: Any = None) -> list[str] | None:
    """The names of a dataset's columns; None where it does not tell.

    Raises:
        InvalidArgument: names `train_dataset`, or `eval_dataset` where `evaluated`, or one of it, is what has no column
            `prompt`.
    """
    several = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    for name, one in several.items():
        _columns(one, f"eval_dataset[{name!r}]" if name else "eval_dataset")
    return _columns(dataset, "train_dataset")


def _columns(dataset: Any, field: str) -> list[str] | None:
    names = getattr(dataset, "column_names", None)
    if names is None:
        return None
    if "prompt" not in names:
        raise invalid(field, f"has no column 'prompt', but {', '.join(names) or 'none at all'}")
    return list(names)


class Noted:
    """A reward function whose Nones are remembered: TRL's Online DPO makes them zeros."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = name_of(function)
        self.rewards: list[float | None] = []

    def __call__(self, *args: Any, **kwargs: Any) -> list[float | None]:
        self.rewards = self.function(*args, **kwargs)
        return self.rewards


def check_noted(functions: list[Any]) -> None:
    """Refuse completions that none of `functions` gave a reward.

    Raises:
        InvalidArgument: REWARD_INVALID, with a violation for each.
    """
    if functions and all(isinstance(function, Noted) for function in functions):
        columns = [[math.nan if one is None else one for one in f.rewards] for f in functions]
        check_rows(torch.tensor(columns).T, [function.__name__ for function in functions])


class RewardedMixin:
    """For trainers whose `_calculate_rewards` gathers the rewards of all ranks: GRPO and RLOO."""

    accelerator: Any
    reward_func_names: list[str]
    reward_funcs: list[Any]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        failures: list[Exception] = []
        functions = self.reward_funcs
        if self.accelerator.num_processes > 1:  # TRL's gathers at its end, which every rank has to reach
            self.reward_funcs = held(functions, failures)
        try:
            rewards = cast(Any, super())._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions
        agree(self.accelerator, failures[0] if failures else None)
        check_rows(rewards, self.reward_func_names, self.reward_funcs)
        return rewards
