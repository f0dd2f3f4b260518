"""What a trainer is given, checked before a model is loaded."""

from __future__ import annotations

import math
from itertools import dropwhile
from typing import Any, cast

import torch

from tandem.errors import invalid
from trainer_service.client import InferenceClient
from trainer_service.rewards import check_rows
from trainer_service.rewards.checks import name_of


def check_config(args: Any, expected: type) -> None:
    """Refuse another algorithm's configuration.

    Raises:
        InvalidArgument: names `args`.
    """
    if not isinstance(args, expected):
        article = "an" if expected.__name__[0] in "AEIOX" else "a"
        raise invalid("args", f"must be {article} {expected.__name__}, is {type(args).__name__}")


def columns_of(dataset: Any) -> list[str] | None:
    """The names of a dataset's columns; None where it does not tell.

    Raises:
        InvalidArgument: names `train_dataset`: it has no column `prompt`.
    """
    names = getattr(dataset, "column_names", None)
    if names is None:
        return None
    if "prompt" not in names:
        raise invalid("train_dataset", f"has no column 'prompt', but {', '.join(names) or 'none at all'}")
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

    reward_func_names: list[str]
    reward_funcs: list[Any]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = cast(Any, super())._calculate_rewards(*args, **kwargs)
        check_rows(rewards, self.reward_func_names, self.reward_funcs)
        return rewards


#: Letters, digits, spaces, signs and scripts: two tokenizers that agree on all of it are one.
_PROBE = 'The 3 quick (brown) foxes\n\tjumped: π ≈ 3.14159; naïve café,  東京 🚀 <|im_end|></s> {"a": [1, 2]}'


def check_tokenizer(client: InferenceClient, processing_class: Any) -> None:
    """Refuse a tokenizer that makes other tokens of a text than the service's, whose ids mean something else then.

    Raises:
        InvalidArgument: names `processing_class`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    special = set(tokenizer.all_special_ids)

    def inner(ids: list[int]) -> list[int]:  # either may begin and end texts in its own way
        return [*dropwhile(special.__contains__, reversed([*dropwhile(special.__contains__, ids)]))]

    ours, theirs = list(tokenizer(_PROBE)["input_ids"]), client.tokenize([_PROBE])[0]
    if inner(ours) != inner(theirs):
        raise invalid(
            "processing_class",
            f"is not the tokenizer of the model that the inference service holds: it makes {len(ours)} tokens of a "
            f"text, the service {len(theirs)}, and not the same",
        )
