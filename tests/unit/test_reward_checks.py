"""What a reward function may return, and what it is told where it does not."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from tandem.errors import InvalidArgument, Reason
from tests import rewards
from trainer_service.rewards import check_rows, checked
from trainer_service.rewards.checks import check_callable, is_async, name_of, verified

NAN, INF = float("nan"), float("inf")


class Instance:
    def __call__(self, **_: Any) -> list[float]:
        return [1.0]


class Awaited:
    async def __call__(self, **_: Any) -> list[float]:
        return [1.0]


FORMS = [
    rewards.length,
    rewards.awaited,
    functools.partial(rewards.length, extra=1),
    functools.partial(functools.partial(rewards.awaited, extra=1), more=2),
    Instance(),
    Awaited(),
    lambda **_: [],
]


@pytest.mark.parametrize("function", FORMS, ids=rewards.shown)
def test_name_and_kind_are_what_trl_takes_them_for(function: Any) -> None:
    assert name_of(function) == get_callable_name(function) == get_callable_name(checked(function))
    assert is_async(function) == is_async_callable(function) == is_async_callable(checked(function))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 2.5, True, None], [1.0, 2.5, 1.0, None]),
        ((0.0, -1.0), [0.0, -1.0]),
        ((x for x in (1, 2)), [1.0, 2.0]),
        (np.array([1, 2]), [1.0, 2.0]),
        ([np.float32(0.5), np.int64(3), np.bool_(True)], [0.5, 3.0, 1.0]),
        (torch.tensor([1.5, 2.0], requires_grad=True), [1.5, 2.0]),
        ([torch.tensor(1), torch.tensor([2.0])], [1.0, 2.0]),
        ([Fraction(1, 2)], [0.5]),
        ([], []),
    ],
    ids=["numbers", "tuple", "generator", "array", "numpy", "tensor", "tensors", "fraction", "nothing"],
)
def test_numbers_of_any_kind_are_floats_afterwards(returned: Any, expected: list[float | None]) -> None:
    found = verified(returned, len(expected), "f")
    assert found == expected
    assert {type(value) for value in found} <= {float, type(None)}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (NAN, "no finite number"),
        (INF, "no finite number"),
        (-INF, "no finite number"),
        (torch.tensor(NAN), "no finite number"),
        (np.float32("inf"), "no finite number"),
        (1e39, "no finite number"),  # as a float32, which it becomes
        (10**400, "no number"),
        ("1.0", "no number"),
        ([1.0], "no number"),
        (torch.tensor([1.0, 2.0]), "no number"),
        (np.array([1.0, 2.0]), "no number"),
        (1j, "no number"),
        (object, "no number"),
    ],
    ids=rewards.shown,
)
def test_a_reward_that_is_none_is_named(value: Any, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked(lambda **_: [0.0, None, value, 1.0, value])(["p"] * 5, ["c"] * 5)
    error = caught.value
    assert error.reason is Reason.REWARD_INVALID
    assert [v.field for v in error.violations] == ["<lambda>[2]", "<lambda>[4]"]
    assert why in error.violations[0].description
    assert repr(value)[:20] in error.violations[0].description
    assert "<lambda>" in error.message
    assert error.metadata == {"reward_function": "<lambda>"}


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (None, "returned None, not a list of 2 rewards"),
        (1.0, "returned 1.0"),
        ("ab", "returned 'ab'"),
        ({"a": 1.0, "b": 2.0}, "returned {"),
        ({1.0, 2.0}, "returned {"),
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 rewards for 2 completions"),
        ([], "returned 0 rewards for 2 completions"),
        (torch.tensor(1.0), "returned tensor"),
    ],
    ids=rewards.shown,
)
def test_what_is_no_list_of_the_right_length_is_named(returned: Any, why: str) -> None:
    def mine(**_: Any) -> Any:
        return returned

    with pytest.raises(InvalidArgument, match=f"the reward function mine failed: mine {why}") as caught:
        checked(mine)(prompts=["p"] * 2, completions=["c"] * 2, completion_ids=[[1]] * 2)
    assert caught.value.reason is Reason.REWARD_INVALID


def test_a_coroutine_of_a_function_that_is_not_async_is_told_of() -> None:
    with pytest.raises(InvalidArgument, match="async def"):
        checked(lambda **arguments: rewards.awaited(**arguments))(["p"], ["c"])


def test_an_async_function_is_awaited_and_checked() -> None:
    async def bad(**_: Any) -> list[float]:
        return [NAN]

    assert asyncio.run(checked(rewards.awaited)(["p"], ["abc"])) == [3.0]
    with pytest.raises(InvalidArgument, match=r"bad\[0\] is nan"):
        asyncio.run(checked(bad)(["p"], ["abc"]))


def test_the_function_gets_what_trl_gives() -> None:
    given: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float]:
        given.update(arguments)
        return [0.0]

    arguments = {
        "prompts": ["p"],
        "completions": ["c"],
        "completion_ids": [[1]],
        "answer": [3],
        "log_extra": print,
    }
    assert checked(spy)(**arguments) == [0.0]
    assert given == arguments


def test_its_own_errors_are_its_own() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        checked(broken)(["p"], ["c"])


def test_a_checked_function_travels_and_is_checked_once() -> None:
    function = checked(rewards.length)
    assert checked(function) is function
    for copied in (pickle.loads(pickle.dumps(function)), copy.deepcopy(function)):  # noqa: S301  # our own
        assert copied(["p"], ["abc"]) == [3.0]
        assert copied.__name__ == "length"


def only_completions(completions: list[str]) -> list[float]:
    return []


def with_answer(completions: list[str], answer: list[str], *, scale: float = 1.0, **_: Any) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("function", "columns", "why"),
    [
        (3, None, "is no function, but int"),
        (Instance, None, "Instance is a class: give an instance"),
        (only_completions, None, "does not take prompts, completion_ids, trainer_state"),
        (
            with_answer,
            {"prompt", "solution"},
            "with_answer needs answer, and the dataset has only prompt, solution",
        ),
    ],
)
def test_what_cannot_be_called_is_told_before_anything_is_generated(
    function: Any, columns: set[str] | None, why: str
) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        check_callable(function, "reward_funcs[1]", columns)
    assert [v.field for v in caught.value.violations] == ["reward_funcs[1]"]


@pytest.mark.parametrize(
    "function", [with_answer, Instance(), Awaited(), rewards.seen, max], ids=rewards.shown
)
def test_what_can_be_called_is_left_alone(function: Any) -> None:
    check_callable(function, "reward_funcs", {"prompt", "answer", "times"})


def test_a_rollout_without_any_reward_is_named_with_all_who_gave_none() -> None:
    check_rows(torch.tensor([[1.0, NAN], [NAN, 2.0]]), ["a", "b"])
    with pytest.raises(
        InvalidArgument, match="2 of 4 rollouts: a, b returned None, first for rollout 1"
    ) as caught:
        check_rows(torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, 0.0], [NAN, NAN]]), ["a", "b"])
    assert caught.value.reason is Reason.REWARD_INVALID
    assert [v.description for v in caught.value.violations] == [
        "none gave rollout 1 a reward",
        "none gave rollout 3 a reward",
    ]


def test_a_models_nan_is_no_none() -> None:
    functions = [rewards.length, torch.nn.Linear(1, 1)]
    values = torch.tensor([[NAN, 1.0], [1.0, NAN]])
    check_rows(values, ["f", "m"])
    with pytest.raises(InvalidArgument, match=r"the reward function m failed: m\[1\] is nan"):
        check_rows(values, ["f", "m"], functions)
    with pytest.raises(InvalidArgument, match=r"f\[0\] is inf"):
        check_rows(torch.tensor([[INF, 1.0]]), ["f", "m"], functions)
