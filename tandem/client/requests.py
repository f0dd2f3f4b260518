"""Prompts and sampling parameters as people write them, made the contract's request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.client.tables import message
from tandem.errors import invalid
from tandem.inference.v1 import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | pb.Prompt
"""Text, token ids, a chat as messages with role and content, or the contract's message, which may have images."""


def generate_request(
    prompts: Prompt | Sequence[Prompt],
    sampling: Mapping[str, Any],
    *,
    n: int,
    lora: str,
    logprobs: bool,
    mode: pb.OutputMode,
) -> pb.GenerateRequest:
    """The request to continue one or several prompts.

    Raises:
        InvalidArgument: names the prompt or the sampling parameter that is malformed.
    """
    given: Sequence[Any] = [prompts] if _is_one(prompts) else prompts  # type: ignore[assignment]
    if not given:
        raise invalid("prompts", "there is none")
    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n < 2**32:
        raise invalid("n", f"must be a whole number, at least 1, is {n!r}")
    made = [_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(given)]
    for prompt in made:
        if not prompt.HasField("n"):
            prompt.n = n
    return pb.GenerateRequest(
        prompts=made,
        sampling=message(pb.SamplingParams, sampling, "sampling"),
        output_mode=mode,
        include_text=True,
        no_logprobs=not logprobs,
        lora=lora,
    )


def _is_one(prompts: Any) -> bool:
    if isinstance(prompts, str | pb.Prompt):
        return True
    return bool(prompts) and isinstance(prompts[0], int | Mapping)


def _prompt(given: Any, path: str) -> pb.Prompt:
    if isinstance(given, pb.Prompt):
        copy = pb.Prompt()
        copy.CopyFrom(given)
        return copy
    if isinstance(given, str):
        return pb.Prompt(text=given)
    if not isinstance(given, Sequence) or not given:
        raise invalid(path, "must be text, a list of token ids, or a list of messages with role and content")
    if isinstance(given[0], Mapping):
        turns = [_turn(turn, f"{path}[{index}]") for index, turn in enumerate(given)]
        return pb.Prompt(chat=pb.Chat(messages=turns))
    return pb.Prompt(token_ids=message(pb.TokenIds, {"ids": given}, path))


def _turn(given: Any, path: str) -> pb.ChatMessage:
    """A message of a chat. What is neither role nor content is for the template."""
    if not isinstance(given, Mapping):
        raise invalid(path, "must be a message with role and content")
    own = {name: value for name, value in given.items() if name in ("role", "content")}
    others = {name: value for name, value in given.items() if name not in own}
    return message(pb.ChatMessage, own | ({"fields": others} if others else {}), path)
