"""What fails on one rank ends all of them, with its reason: the others would wait for it in the next collective."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather  # type: ignore[import-untyped]

from trainer_service.ranks import heard, said
from trainer_service.rewards.checks import is_async


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
        words = f"{{}} (rank {accelerator.process_index})"
        own = b"" if failure is None else said(failure, words)
        device = accelerator.device
        lengths = gather(torch.tensor([len(own)], dtype=torch.int64, device=device)).tolist()
        if failure is None and not any(lengths):
            return
        text = torch.zeros((1, max(lengths)), dtype=torch.uint8, device=device)
        if own:
            text[0, : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        texts = gather(text)
        if failure is None:
            rank = next(rank for rank, length in enumerate(lengths) if length)
            raise heard(bytes(texts[rank, : lengths[rank]].tolist()))
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
