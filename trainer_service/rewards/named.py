"""Rewards by name, and what trainers make of those that they are given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tandem.errors import invalid
from trainer_service.rewards.checks import RewardFunction, check_callable, checked, is_async, name_of
from trainer_service.rewards.imported import attribute, literals, made
from trainer_service.rewards.remote import RemoteReward, from_environment

_NAME = r"[A-Za-z_][A-Za-z0-9_.]*"
#: Arguments after a name: `get_repetition_penalty_reward(ngram_size=3)`.
_WITH_ARGUMENTS = re.compile(rf"(?P<name>{_NAME})(?P<arguments>\(.*\))?", re.DOTALL)
_IN_MODULE = re.compile(rf"(?P<module>{_NAME}):(?P<name>{_NAME})(?P<arguments>\(.*\))?", re.DOTALL)
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: TRL's module whose functions need math-verify.
_MATH = "trl.rewards.accuracy_rewards"


def prepared(
    reward_funcs: Any, *, columns: Collection[str] | None = None, awaits: bool = True, reach: bool = True
) -> list[Any]:
    """What a trainer gives to TRL as `reward_funcs`.

    Args:
        reward_funcs: a function, a model, a name as `reward` takes it, a list of them, or None.
        columns: the dataset's columns, if they are known: a function that needs another one is told of.
        awaits: whether the trainer awaits async functions. TRL's GRPOTrainer and RLOOTrainer do.
        reach: whether reward services are called, once, so that one that is down is told of now.

    Returns:
        A new list: models and models' names as they are, functions such that what they return is checked.

    Raises:
        InvalidArgument: names the one at fault, `reward_funcs[1]`.
        Unavailable, DeadlineExceeded: a reward service does not answer.
    """
    if reward_funcs is None:
        return []
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    found: list[Any] = []
    for i, spec in enumerate(given):
        field = f"reward_funcs[{i}]"
        one = reward(spec, field=field)
        if not isinstance(one, str | RemoteReward) and not _is_model(one):  # a service's are checked anyhow
            check_callable(one, field, columns)
            _check_math(one, field)
            if is_async(one) and not awaits:
                raise invalid(field, f"{name_of(one)} is async, and this trainer does not await it")
            one = checked(one, field=field)
        found.append(one)
    if reach:
        for one in found:
            if isinstance(one, RemoteReward):
                one.check()
    return found


def reward(spec: Any, *, field: str = "reward_funcs") -> Any:
    """The reward that a name stands for.

    Args:
        spec: `think_format_reward` and others of `trl.rewards`, where one that makes rewards has its arguments behind
            it, `get_repetition_penalty_reward(ngram_size=3)`; `module:function`; the address of a RewardService,
            `unix:///path` or `grpc://host:port`; the folder of a reward model, or its name on the Hugging Face hub.
            What is no text stays.
        field: what to call it in the error.

    Returns:
        A function, a RemoteReward, or the name of a model, which TRL loads.

    Raises:
        InvalidArgument: there is no such thing, or it cannot be imported.
    """
    if not isinstance(spec, str):
        return spec
    if spec.startswith("unix:"):
        return from_environment(spec, field=field)
    if spec.startswith("grpc://"):
        return from_environment(spec.removeprefix("grpc://"), field=field)
    if spec and Path(spec).expanduser().is_dir():
        return str(Path(spec).expanduser())
    if spec.startswith((".", "/", "~")):
        raise invalid(field, f"there is no folder {spec}")
    if _ON_HUB.fullmatch(spec):
        return spec
    return function(spec, field=field)


def function(spec: str, *, field: str) -> RewardFunction:
    """The function that a name stands for: one of TRL's, or `module:function`.

    Raises:
        InvalidArgument: names `field`.
    """
    if match := _IN_MODULE.fullmatch(spec):
        found = _function(match["module"], match["name"], field)
        if match["arguments"] is None:
            return found
        return _of(found, literals(match["arguments"], spec, field), spec, field)
    if match := _WITH_ARGUMENTS.fullmatch(spec):
        arguments = None if match["arguments"] is None else literals(match["arguments"], spec, field)
        return builtin(match["name"], arguments, field=field)
    raise invalid(
        field,
        f"{spec!r} is no name of a reward: give one of {', '.join(_builtins())}, module:function, the address of a "
        "reward service (unix:///path, grpc://host:port), or a model (a folder, or owner/name)",
    )


def builtin(
    name: str, arguments: dict[str, Any] | None = None, *, field: str = "reward_funcs"
) -> RewardFunction:
    """One of `trl.rewards`.

    Args:
        name: its name.
        arguments: those of one that makes rewards, such as `get_soft_overlong_punishment`, which then is called.
        field: what to call it in the error.

    Raises:
        InvalidArgument: there is none, it does not take these arguments, or it needs what is not installed.
    """
    names = _builtins()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}" if near else f"there are {', '.join(names)}"
        raise invalid(
            field,
            f"TRL has no reward {name!r}: {hint}; a model of the Hugging Face hub is written owner/name",
        )
    found = _function("trl.rewards", name, field)
    if name.startswith("get_"):
        found = _of(found, arguments or {}, name, field)
    elif arguments:
        raise invalid(field, f"{name} is a reward by itself, and takes no arguments")
    _check_math(found, field)
    return found


def _builtins() -> list[str]:
    from trl import rewards  # loads none of TRL's trainers, nor vLLM

    return sorted(name for name in dir(rewards) if name.endswith("_reward") or name.startswith("get_"))


def _function(module: str, name: str, field: str) -> RewardFunction:
    found: RewardFunction = attribute(module, name, field)
    if not callable(found):
        raise invalid(field, f"{module}:{name} is no function, but {type(found).__name__}")
    return found


def _of(factory: RewardFunction, arguments: dict[str, Any], name: str, field: str) -> RewardFunction:
    found: RewardFunction = made(factory, arguments, name, field)
    if not callable(found):
        raise invalid(field, f"{name} makes no function, but {type(found).__name__}")
    return found


def _check_math(function: Any, field: str) -> None:
    """TRL tells that math-verify is missing when the first rollouts are scored."""
    if getattr(function, "__module__", None) != _MATH:
        return
    from trl.import_utils import is_math_verify_available

    if not is_math_verify_available():
        raise invalid(field, "needs math-verify, which is not installed here: pip install math-verify")


def _is_model(function: Any) -> bool:
    from torch import nn

    return isinstance(function, nn.Module)
