"""Protobuf's sampling parameters as vLLM's."""

from __future__ import annotations

from typing import Any

from inference_service.engine import ModelInfo, refusal
from tandem.errors import InvalidArgument, invalid
from tandem.inference.v1 import inference_pb2 as pb

_PLAIN = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
)
_LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")


def sampling_params(request: pb.GenerateRequest, info: ModelInfo) -> Any:
    """vLLM's SamplingParams for one rollout of `request`, without a seed.

    Raises:
        InvalidArgument: names the field.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    message = request.sampling
    values: dict[str, Any] = {name: getattr(message, name) for name in _PLAIN if message.HasField(name)}
    values |= {name: list(getattr(message, name)) for name in _LISTS if getattr(message, name)}
    if message.logit_bias:
        values["logit_bias"] = dict(message.logit_bias)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in values.get(name, ()):
            if token >= info.vocab_size:
                raise invalid(f"sampling.{name}", f"{token} is not in the vocabulary of {info.vocab_size}")
    if not request.no_logprobs:
        values["logprobs"] = message.top_logprobs
    elif message.top_logprobs:
        raise invalid("sampling.top_logprobs", "not with no_logprobs")
    deltas = request.output_mode == pb.OUTPUT_MODE_DELTAS
    try:
        return SamplingParams(
            **values,
            structured_outputs=_structured(message),
            flat_logprobs=True,
            # Stop strings are found in the text.
            detokenize=request.include_text or bool(message.stop),
            output_kind=RequestOutputKind.DELTA if deltas else RequestOutputKind.FINAL_ONLY,
        )
    except Exception as error:
        if (refused := refusal(error)) is None:
            raise
        raise _named(refused, error) from error


def score_params(request: pb.ScoreRequest, info: ModelInfo) -> Any:
    """vLLM's SamplingParams for scoring one sequence of `request`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if 0 <= info.max_logprobs < request.top_logprobs:
        raise invalid("top_logprobs", f"the engine's limit is {info.max_logprobs}")
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=request.top_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _structured(message: pb.SamplingParams) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    output = message.structured_output
    match output.WhichOneof("constraint"):
        case None:
            if message.HasField("structured_output"):
                raise invalid("sampling.structured_output", "one of regex, json_schema, grammar, choice is required")
            return None
        case "json_schema":
            return StructuredOutputsParams(json=output.json_schema)
        case "choice":
            return StructuredOutputsParams(choice=list(output.choice.values))
        case kind:
            return StructuredOutputsParams(**{kind: getattr(output, kind)})


def _named(refused: str, error: BaseException) -> InvalidArgument:
    """The error with the name of the parameter that vLLM's message is about."""
    names = [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]
    parameter = getattr(error, "parameter", None)
    words = refused.replace("`", " ").replace("'", " ").split()
    name = next((word for word in [parameter, *words] if word in names), None)
    return invalid(f"sampling.{name}" if name else "sampling", refused)


def seeded(params: Any, seed: int | None, index: int) -> Any:
    """`params` for the `index`-th rollout of a request with `seed`."""
    if seed is None:
        return params
    own = params.clone()
    own.seed = (seed + index) % 2**63
    return own


