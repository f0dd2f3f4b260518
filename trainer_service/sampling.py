"""Sampling parameters under vLLM's names, as in TRL's `generation_kwargs`, made the contract's message."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.errors import InvalidArgument, Reason, Violation, invalid
from tandem.inference.v1 import inference_pb2 as pb

_SCALARS = frozenset(
    {
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "ignore_eos",
        "skip_special_tokens",
        "mixture_coef",
    }
)
_LISTS = frozenset({"stop", "stop_token_ids", "bad_words", "allowed_token_ids"})
_OTHERS = frozenset({"top_k", "logprobs", "logit_bias", "structured_outputs"})
NAMES = _SCALARS | _LISTS | _OTHERS


def sampling_params(values: Mapping[str, Any]) -> pb.SamplingParams:
    """Make the message. A value of None is the same as none.

    Args:
        values: by vLLM's names; `logprobs` is the number of top logprobs beside the sampled token's, and
            `structured_outputs` a mapping with one of regex, json, json_object, grammar, choice.

    Raises:
        InvalidArgument: names every unknown key, or the one whose value has the wrong type or range.
    """
    unknown = sorted(set(values) - NAMES)
    if unknown:
        known = ", ".join(sorted(NAMES))
        raise InvalidArgument(
            Reason.FIELD_INVALID,
            f"There are no such sampling parameters: {', '.join(unknown)}. There are: {known}.",
            violations=[Violation(f"generation_kwargs.{name}", "unknown") for name in unknown],
        )
    params = pb.SamplingParams()
    for name, value in values.items():
        if value is None:
            continue
        try:
            _set(params, name, value)
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidArgument):
                raise
            raise invalid(f"generation_kwargs.{name}", f"{value!r}: {error}") from error
    return params


def _set(params: pb.SamplingParams, name: str, value: Any) -> None:
    if name in _SCALARS:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        setattr(params, name, value)
    elif name in _LISTS:
        getattr(params, name).extend([value] if isinstance(value, str | int) else value)
    elif name == "top_k":
        params.top_k = 0 if value == -1 else value  # -1 is an older way to say all
    elif name == "logprobs":
        params.top_logprobs = value
    elif name == "logit_bias":
        for token, bias in dict(value).items():
            params.logit_bias[int(token)] = bias
    else:
        params.structured_output.CopyFrom(_structured_output(value))


def _structured_output(value: Any) -> pb.StructuredOutput:
    field = "generation_kwargs.structured_outputs"
    if not isinstance(value, Mapping):
        raise invalid(field, f"must be a mapping, is {type(value).__name__}")
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    if len(given) != 1:
        raise invalid(field, f"must have one constraint, has {sorted(given) or 'none'}")
    ((kind, item),) = given.items()
    match kind:
        case "regex":
            return pb.StructuredOutput(regex=item)
        case "json":
            return pb.StructuredOutput(json_schema=item if isinstance(item, str) else json.dumps(item))
        case "json_object":
            return pb.StructuredOutput(json_schema='{"type": "object"}')
        case "grammar":
            return pb.StructuredOutput(grammar=item)
        case "choice" if isinstance(item, Sequence) and not isinstance(item, str):
            return pb.StructuredOutput(choice=pb.Choice(values=item))
    raise invalid(
        f"{field}.{kind}", "must be regex, json, json_object, grammar, or choice (a list of strings)"
    )
