"""What fails on one rank ends all of them, with its reason: the others would wait for it in the next collective."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather  # type: ignore[import-untyped]

from tandem.errors import CATALOGUE, Reason, TandemError
from trainer_service.ranks import OtherRankError
from trainer_service.rewards.checks import is_async

_LONGEST = 4000  # characters of what a rank says


def agree(accelerator: Accelerator, failure: Exception | None) -> None:
    """Return on every rank, or raise on every rank. All must call this.

    Args:
        accelerator: of the run.
        failure: what went wrong on this rank. It is raised again here.

    Raises:
        TandemError: of another rank, with its class and reason.
        OtherRankError: another rank failed with anything else.
    """
    if accelerator.num_processes > 1:
        said = b"" if failure is None else _said(failure, accelerator.process_index)
        device = accelerator.device
        lengths = gather(torch.tensor([len(said)], dtype=torch.int64, device=device)).tolist()
        if failure is None and not any(lengths):
            return
        text = torch.zeros((1, max(lengths)), dtype=torch.uint8, device=device)
        if said:
            text[0, : len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        texts = gather(text)
        if failure is None:
            rank = next(rank for rank, length in enumerate(lengths) if length)
            raise _heard(bytes(texts[rank, : lengths[rank]].tolist()))
    if failure is not None:
        raise failure


def held(functions: Sequence[Any], failures: list[Exception]) -> list[Any]:
    """Reward functions in whose place nothing is raised: what they raise is added to `failures`, for `agree`.

    Reward models stay what they are.
    """
    return [one if isinstance(one, torch.nn.Module) else _held(one, failures) for one in functions]


def _held(function: Callable[..., Any], failures: list[Exception]) -> Callable[..., Any]:
    if is_async(function):

        async def awaited(**given: Any) -> Any:
            try:
                return await function(**given)
            except Exception as error:  # noqa: BLE001  # raised by `agree`
                failures.append(error)
                return [0.0] * len(given["prompts"])

        return functools.wraps(function, updated=())(awaited)

    def called(**given: Any) -> Any:
        try:
            return function(**given)
        except Exception as error:  # noqa: BLE001  # raised by `agree`
            failures.append(error)
            return [0.0] * len(given["prompts"])

    return functools.wraps(function, updated=())(called)


def _said(error: Exception, rank: int) -> bytes:
    reason, text = "", f"{type(error).__name__}: {error}"
    if isinstance(error, TandemError):
        reason, text = str(error.reason), error.message
    return json.dumps({"reason": reason, "text": f"{text[:_LONGEST]} (rank {rank})"}).encode()


def _heard(said: bytes) -> Exception:
    told = json.loads(said)
    if told["reason"] in CATALOGUE:
        reason = Reason(told["reason"])
        return CATALOGUE[reason](reason, told["text"])
    return OtherRankError(told["text"])
