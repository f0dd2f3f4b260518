"""Protobuf's sampling parameters as vLLM's."""

from __future__ import annotations

from typing import Any

from inference_service.launch import COEFFICIENT, ModelInfo
from inference_service.refusals import named
from tandem.errors import FailedPrecondition, Reason, invalid
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
_NAMES = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)


def sampling_params(request: pb.GenerateRequest, info: ModelInfo) -> Any:
    """vLLM's SamplingParams for one rollout of `request`, without a seed.

    Raises:
        InvalidArgument: names the field.
        FailedPrecondition: REFERENCE_OFF.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    message = request.sampling
    values: dict[str, Any] = {name: getattr(message, name) for name in _PLAIN if message.HasField(name)}
    values |= {name: list(getattr(message, name)) for name in _LISTS if getattr(message, name)}
    if message.logit_bias:
        values["logit_bias"] = dict(message.logit_bias)
    _check_tokens(values, info)
    if not request.no_logprobs:
        check_top_logprobs(message.top_logprobs, "sampling.top_logprobs", info)
        values["logprobs"] = message.top_logprobs
    elif message.top_logprobs:
        raise invalid("sampling.top_logprobs", "not with no_logprobs")
    values |= _mixture(request, info)
    if request.output_mode not in pb.OutputMode.values():
        raise invalid("output_mode", f"no OutputMode {request.output_mode}")
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
        if (refused := named(error, "sampling", _NAMES)) is None:
            raise
        raise refused from error


def score_params(request: pb.ScoreRequest, info: ModelInfo) -> Any:
    """vLLM's SamplingParams for scoring one sequence of `request`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    check_top_logprobs(request.top_logprobs, "top_logprobs", info)
    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=request.top_logprobs,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _mixture(request: pb.GenerateRequest, info: ModelInfo) -> dict[str, Any]:
    message, field = request.sampling, "sampling.mixture_coef"
    coefficient = message.mixture_coef
    if not 0 <= coefficient <= 1:
        raise invalid(field, f"must be in [0, 1], got {coefficient}")
    if not coefficient:
        return {}
    if not info.reference_model:
        raise FailedPrecondition(
            Reason.REFERENCE_OFF, "start the service with reference_model to mix with it"
        )
    if message.logit_bias:
        raise invalid("sampling.logit_bias", "not with mixture_coef")
    if any(prompt.images for prompt in request.prompts):
        raise invalid(field, "not for prompts with images")
    return {"extra_args": {COEFFICIENT: coefficient}}


def _structured(message: pb.SamplingParams) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    if not message.HasField("structured_output"):
        return None
    output, field = message.structured_output, "sampling.structured_output"
    match output.WhichOneof("constraint"):
        case None:
            raise invalid(field, "one of regex, json_schema, grammar, choice is required")
        case "json_schema":
            return StructuredOutputsParams(json=output.json_schema)
        case "choice":
            if not output.choice.values:
                raise invalid(f"{field}.choice.values", "at least one is required")
            return StructuredOutputsParams(choice=list(output.choice.values))
        case kind:
            return StructuredOutputsParams(**{kind: getattr(output, kind)})


def check_top_logprobs(k: int, field: str, info: ModelInfo) -> None:
    """Refuse more than the engine gives."""
    limit = info.vocab_size if info.max_logprobs < 0 else info.max_logprobs
    if k > limit:
        raise invalid(field, f"the engine's limit is {limit}, got {k}")


def _check_tokens(values: dict[str, Any], info: ModelInfo) -> None:
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token in values.get(name, ()):
            if token >= info.vocab_size:
                raise invalid(f"sampling.{name}", f"{token} is not in the vocabulary of {info.vocab_size}")
    for token, bias in values.get("logit_bias", {}).items():
        if not -100 <= bias <= 100:  # vLLM adds whatever it gets, NaN too
            raise invalid(f"sampling.logit_bias[{token}]", f"must be in [-100, 100], got {bias}")
