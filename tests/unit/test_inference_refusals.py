"""What vLLM says against its input, with the name of the field."""

from __future__ import annotations

import pydantic
import pytest

from inference_service.refusals import named, refusal, unknown
from tandem.errors import NotFound, Reason, invalid

NAMES = {
    "max_tokens",
    "min_tokens",
    "temperature",
    "stop",
    "stop_token_ids",
    "model",
    "max_model_len",
    "seed",
}


class VLLMClientError(Exception):
    """As in vLLM 0.31, where it is no ValueError."""

    def __init__(self, text: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.parameter = parameter


class VLLMValidationError(VLLMClientError):
    """Its most frequent kind."""


class EngineGenerateError(Exception):
    """What vLLM wraps others in."""


def test_only_what_the_input_is_to_blame_for_is_a_refusal() -> None:
    assert refusal(ValueError("a\n  b")) == "a b"
    assert refusal(VLLMValidationError("no")) == "no"
    assert refusal(RuntimeError("broken")) is None
    assert refusal(KeyError("bug")) is None
    assert len(refusal(ValueError("x" * 10_000)) or "") == 2000


def test_a_wrapped_error_counts_for_what_it_is() -> None:
    for cause, said in ((ValueError("bad"), "bad"), (RuntimeError("broken"), None)):
        wrapped = EngineGenerateError()
        wrapped.__cause__ = cause
        assert refusal(wrapped) == said


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (ValueError("max_tokens must be at least 1, got 0."), "x.max_tokens"),
        (ValueError("temperature must be in [0, 2]"), "x.temperature"),
        (ValueError("stop cannot contain an empty string."), "x.stop"),
        (ValueError("min_tokens must be at most max_tokens=16"), "x.min_tokens"),
        (ValueError("User-specified max_model_len (9) is too large for the model"), "x.max_model_len"),
        (ValueError("the model and the seed do not agree"), "x"),  # words, not names
        (VLLMValidationError("something about it", parameter="stop_token_ids"), "x.stop_token_ids"),
        (VLLMValidationError("something about it", parameter="unheard_of"), "x"),
    ],
)
def test_the_parameter_is_found_in_the_words(error: Exception, field: str) -> None:
    found = named(error, "x", NAMES)
    assert found is not None
    assert [violation.field for violation in found.violations] == [field]


def test_what_is_named_nowhere_has_the_name_to_expect() -> None:
    found = named(ValueError("Grammar error"), "sampling", NAMES, otherwise="structured_output")
    assert found is not None
    assert found.violations[0].field == "sampling.structured_output"


def test_tandems_own_errors_pass() -> None:
    own = invalid("sampling.logit_bias[5]", "too large")
    assert named(own, "x", NAMES) is own
    assert named(NotFound(Reason.LORA_NOT_FOUND, "gone"), "x", NAMES) is None
    assert named(RuntimeError("broken"), "x", NAMES) is None


def test_pydantics_errors_are_told_by_field() -> None:
    class Config(pydantic.BaseModel):
        max_model_len: int
        seed: int | bool

        @pydantic.model_validator(mode="after")
        def _check(self) -> Config:
            raise ValueError("max_tokens and\n the rest do not agree")

    with pytest.raises(pydantic.ValidationError) as raised:
        Config(max_model_len="many", seed="none")  # type: ignore[arg-type]
    found = named(raised.value, "engine", NAMES)
    assert found is not None
    assert [violation.field for violation in found.violations] == ["engine.max_model_len", "engine.seed"]
    assert ", or: " in found.violations[1].description  # neither of the types
    assert "pydantic" not in str(found)
    with pytest.raises(pydantic.ValidationError) as raised:
        Config(max_model_len=1, seed=1)
    found = named(raised.value, "engine", NAMES)
    assert found is not None
    assert found.message == "engine.max_tokens: max_tokens and the rest do not agree"


def test_unknown_names_are_all_told_with_what_was_meant() -> None:
    assert unknown(["max_model_len"], NAMES, "engine", "argument") is None
    found = unknown(["max_model_length", "seed", "zzz"], NAMES, "engine", "argument")
    assert found is not None
    assert [violation.field for violation in found.violations] == ["engine.max_model_length", "engine.zzz"]
    assert found.violations[0].description == "there is no such argument; did you mean max_model_len?"
    assert found.violations[1].description == "there is no such argument"
