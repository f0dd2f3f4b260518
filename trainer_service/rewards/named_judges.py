"""Judges by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import InvalidArgument, invalid
from tandem.rpc.trust import read_token
from trainer_service.client import InferenceClient
from trainer_service.rewards.engine_judge import EngineJudge
from trainer_service.rewards.imported import attribute, made
from trainer_service.rewards.judges import PairwiseJudge, RewardJudge
from trainer_service.rewards.named import reward


def judge(spec: Any, arguments: Mapping[str, Any] | None = None, *, field: str = "judge") -> PairwiseJudge:
    """The judge that a name stands for.

    Args:
        spec: `engine`, an EngineJudge of the service at `address`, with `token_file` and `ca_file` if it wants them;
            `reward`, a RewardJudge of the function that `reward_func` names; or `module:attribute`, a judge, or what
            makes one of the arguments. What is no text stays.
        arguments: of the judge; what is not named above, an EngineJudge's own.
        field: what to call it in the error.

    Raises:
        InvalidArgument: there is no such judge, or it does not take these arguments.
    """
    given = dict(arguments or {})
    if not isinstance(spec, str):
        found = spec
    elif spec == "engine":
        found = _engine(given, field)
    elif spec == "reward":
        found = made(_by_reward, given, spec, field)
    elif ":" in spec:
        module, _, name = spec.partition(":")
        found = attribute(module, name, field)
        if isinstance(found, type) or not isinstance(found, PairwiseJudge):
            if not callable(found):
                raise invalid(field, f"{spec} is neither a judge nor makes one")
            found = made(found, given, spec, field)
        elif given:
            raise invalid(field, f"{spec} is a judge by itself, and takes no arguments")
    else:
        raise invalid(field, f"{spec!r} is no judge's name: give engine, reward or module:attribute")
    if not isinstance(found, PairwiseJudge) or isinstance(found, type):
        raise invalid(field, f"{spec} is no judge: it has no method `judge`")
    return found


def _engine(arguments: dict[str, Any], field: str) -> EngineJudge:
    if "address" not in arguments:
        raise invalid(field, "the judge engine needs the address of an inference service")
    channel: dict[str, Any] = {
        name: arguments.pop(name) for name in ("address", "ca_file") if name in arguments
    }
    try:
        if token_file := arguments.pop("token_file", None):
            channel["token"] = read_token(Path(token_file))
        client = InferenceClient(**channel)
    except InvalidArgument as error:
        raise invalid(field, f"the judge engine: {error.message}") from error
    return made(lambda **rest: EngineJudge(client, **rest), arguments, "engine", field)  # type: ignore[no-any-return]


def _by_reward(reward_func: str) -> RewardJudge:
    return RewardJudge(reward(reward_func))
