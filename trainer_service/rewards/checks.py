"""What a reward function may return, and the error that names it where it returns something else."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import TYPE_CHECKING, Any

from tandem.errors import InvalidArgument, Reason, Violation, invalid

if TYPE_CHECKING:
    import torch

RewardFunction = Callable[..., Any]

#: What every trainer of TRL's passes, by keyword.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state")
#: What some of them pass beside the columns of the dataset.
EXTRAS = frozenset({*PASSED, "log_extra", "log_metric", "environments"})
#: The largest float32, which is what TRL makes of rewards.
_LARGEST = 3.4028235e38


def checked(function: RewardFunction, *, field: str = "reward_funcs") -> RewardFunction:
    """Have what a reward function returns looked at before anything is learnt from it.

    What it returns is made a list of floats and Nones. An async function stays one, and the name stays.

    Args:
        function: with TRL's signature: `prompts`, `completions`, `completion_ids` and the columns by keyword.
        field: what to call the function in the error.

    Raises:
        InvalidArgument: it is no function, or takes no such arguments. When called: REWARD_INVALID, it returned the
            wrong number of rewards, or one that is neither a finite number nor None.
    """
    if isinstance(function, _Checked | _AsyncChecked):
        return function
    check_callable(function, field)
    return _AsyncChecked(function) if is_async(function) else _Checked(function)


def check_callable(function: Any, field: str, columns: Collection[str] | None = None) -> None:
    """Refuse what TRL could not call with rollouts.

    Args:
        function: the function.
        field: what to call it in the error.
        columns: the dataset's columns, if they are known. Then a parameter that nobody gives is told of too.

    Raises:
        InvalidArgument: names `field`.
    """
    if not callable(function):
        raise invalid(field, f"is no function, but {type(function).__name__}")
    name = name_of(function)
    if inspect.isclass(function):
        raise invalid(field, f"{name} is a class: give an instance of it")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some written in C have none that can be read
        return
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = [name for name in PASSED if name not in takes]
    if missing and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise invalid(
            field,
            f"{name} does not take {', '.join(missing)}, which trainers pass: add **kwargs; or, if it makes reward "
            "functions, give what it makes",
        )
    if columns is None:
        return
    needed = [p.name for p in parameters if p.name in takes and p.default is p.empty]
    if unknown := [n for n in needed if n not in columns and n not in EXTRAS]:
        raise invalid(
            field, f"{name} needs {', '.join(unknown)}, and the dataset has only {', '.join(sorted(columns))}"
        )


def name_of(function: Any) -> str:
    """The function's name in metrics and errors, which is TRL's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: Any) -> bool:
    """Whether TRL awaits what calling the function returns."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def verified(rewards: Any, count: int, name: str, *, subject: str = "") -> list[float | None]:
    """What a reward function returned, as plain floats and Nones.

    Args:
        rewards: an iterable of numbers, of numpy's or torch's too, and None.
        count: how many there have to be.
        name: the function's.
        subject: how the error begins. By default with the function's name.

    Raises:
        InvalidArgument: REWARD_INVALID, with a violation for each that is wrong, `name[index]`.
    """
    given = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # an array or tensor of any shape
    if inspect.iscoroutine(given):
        given.close()
        raise _wrong(name, [Violation(name, "returned a coroutine: write it as an async def")], subject)
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | Set):
        what = f"returned {_shown(rewards)}, not a list of {count} rewards"
        raise _wrong(name, [Violation(name, what)], subject)
    given = list(given)
    if len(given) != count:
        what = f"returned {len(given)} rewards for {count} completions"
        raise _wrong(name, [Violation(name, what)], subject)
    found: list[float | None] = []
    violations: list[Violation] = []
    for index, value in enumerate(given):
        number, why = _number(value)
        found.append(number)
        if why:
            violations.append(Violation(f"{name}[{index}]", f"is {_shown(value)}, {why}"))
    if violations:
        raise _wrong(name, violations, subject)
    return found


def check_rows(
    rewards: torch.Tensor, names: Sequence[str], functions: Sequence[Any] = (), *, field: str = "reward_funcs"
) -> None:
    """Refuse rollouts that nobody gave a reward, which TRL would take for worth 0.

    Args:
        rewards: (rollouts, functions), NaN where a function returned None.
        names: the functions'.
        functions: the functions themselves, if they are there: a reward model cannot say None, so its NaN is an error.
        field: what to call the functions in the error.

    Raises:
        InvalidArgument: REWARD_INVALID, with a violation for each rollout.
    """
    models = [i for i, function in enumerate(functions) if _is_model(function)]
    missing = rewards.isnan()
    violations = [
        Violation(f"{names[column]}[{row}]", f"is {rewards[row, column].item()}, which is no finite number")
        for row, column in (~rewards.isfinite()).nonzero().tolist()
        if column in models or not missing[row, column]
    ]
    if violations:
        raise _wrong(violations[0].field.partition("[")[0], violations)
    if rows := missing.all(dim=1).nonzero().flatten().tolist():
        told = f"no reward for {len(rows)} of {len(rewards)} rollouts: {', '.join(names)} returned None"
        raise InvalidArgument(
            Reason.REWARD_INVALID,
            f"{told}, first for rollout {rows[0]}",
            violations=[Violation(field, f"none gave rollout {row} a reward") for row in rows],
            metadata={"reward_functions": ", ".join(names)},
        )


class _Wrapped:
    """A function and its name. It can be pickled where the function can."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = name_of(function)

    def __repr__(self) -> str:
        return f"checked({self.function!r})"


class _Checked(_Wrapped):
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        return verified(self.function(**given, **columns), len(prompts), self.__name__)


class _AsyncChecked(_Wrapped):
    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        return verified(await self.function(**given, **columns), len(prompts), self.__name__)


def _number(value: Any) -> tuple[float | None, str]:
    """A reward, and what is wrong with it."""
    if value is None:
        return None, ""
    try:
        plain = value.item() if hasattr(value, "item") else value  # numpy's and torch's
        number = float(plain) if isinstance(plain, Real) else None
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of several elements, or of 400 digits
        number = None
    if number is None:
        return None, "which is no number"
    if not math.isfinite(number) or abs(number) > _LARGEST:
        return None, "which is no finite number"
    return number, ""


def _is_model(function: Any) -> bool:
    from torch import nn

    return isinstance(function, nn.Module)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wrong(name: str, violations: list[Violation], subject: str = "") -> InvalidArgument:
    first = violations[0]
    more = f", and {len(violations) - 1} more like it" if len(violations) > 1 else ""
    return InvalidArgument(
        Reason.REWARD_INVALID,
        f"{subject or f'the reward function {name}'} failed: {first.field} {first.description}{more}",
        violations=violations,
        metadata={"reward_function": name},
    )
