"""TRL's generation_kwargs as the contract's message."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.errors import InvalidArgument
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.sampling import sampling_params


def test_every_parameter_arrives() -> None:
    values: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "min_p": 0.125,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logit_bias": {"4": 1.5, 5: -2},
        "bad_words": ["no"],
        "allowed_token_ids": [1, 2],
        "logprobs": 3,
        "structured_outputs": {"regex": "[0-9]+"},
        "skip_special_tokens": False,
        "mixture_coef": 0.5,
    }
    params = sampling_params(values)
    assert params == pb.SamplingParams(
        **{k: v for k, v in values.items() if k not in ("logprobs", "logit_bias", "structured_outputs")},
        logit_bias={4: 1.5, 5: -2.0},
        top_logprobs=3,
        structured_output=pb.StructuredOutput(regex="[0-9]+"),
    )
    unset = {f.name for f in pb.SamplingParams.DESCRIPTOR.fields} - {f.name for f, _ in params.ListFields()}
    assert not unset, "a parameter of the contract that no name of vLLM's reaches"


def test_none_is_unset_and_minus_one_is_all() -> None:
    assert sampling_params({"seed": None, "min_p": None, "stop": None}) == pb.SamplingParams()
    assert sampling_params({"top_k": -1}) == pb.SamplingParams(top_k=0)
    assert sampling_params({"stop": "end"}) == pb.SamplingParams(stop=["end"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"regex": "a+"}, pb.StructuredOutput(regex="a+")),
        ({"json": {"type": "object"}}, pb.StructuredOutput(json_schema='{"type": "object"}')),
        (
            {"json": '{"type": "string"}', "regex": None},
            pb.StructuredOutput(json_schema='{"type": "string"}'),
        ),
        ({"json_object": True}, pb.StructuredOutput(json_schema='{"type": "object"}')),
        ({"grammar": "root ::= x"}, pb.StructuredOutput(grammar="root ::= x")),
        ({"choice": ["a", "b"]}, pb.StructuredOutput(choice=pb.Choice(values=["a", "b"]))),
    ],
)
def test_structured_outputs(given: dict[str, Any], expected: pb.StructuredOutput) -> None:
    assert sampling_params({"structured_outputs": given}).structured_output == expected


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperatur": 1.0}, "generation_kwargs.temperatur"),
        ({"n": 2}, "generation_kwargs.n"),
        ({"temperature": "hot"}, "generation_kwargs.temperature"),
        ({"temperature": float("nan")}, "generation_kwargs.temperature"),
        ({"max_tokens": -1}, "generation_kwargs.max_tokens"),
        ({"top_k": -2}, "generation_kwargs.top_k"),
        ({"top_k": 1.5}, "generation_kwargs.top_k"),
        ({"stop": [1]}, "generation_kwargs.stop"),
        ({"logit_bias": {"x": 1}}, "generation_kwargs.logit_bias"),
        ({"logit_bias": [1]}, "generation_kwargs.logit_bias"),
        ({"structured_outputs": "a+"}, "generation_kwargs.structured_outputs"),
        ({"structured_outputs": {}}, "generation_kwargs.structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": "{}"}}, "generation_kwargs.structured_outputs"),
        ({"structured_outputs": {"regex": 3}}, "generation_kwargs.structured_outputs"),
        ({"structured_outputs": {"choice": "ab"}}, "generation_kwargs.structured_outputs.choice"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "generation_kwargs.structured_outputs.structural_tag",
        ),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        sampling_params(values)
    assert [violation.field for violation in raised.value.violations] == [field]


def test_all_unknown_names_are_told_at_once() -> None:
    with pytest.raises(InvalidArgument, match="best_of, truncate_prompt_tokens"):
        sampling_params({"best_of": 2, "truncate_prompt_tokens": 3, "seed": 1})
