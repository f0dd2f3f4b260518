"""A bad request gets an error that names its field, changes nothing, and harms nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument, NotFound, Reason, ResourceExhausted, Violation
from tandem.inference.v1 import inference_pb2 as pb
from tandem.rpc import connect
from tests.integration.calls import generate, idle, ids, one, refused, request, stats
from tests.services import Service

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _unharmed(llama: Service) -> Iterator[None]:
    """The engine is what it was before, and answers."""
    idle(llama)
    before = stats(llama)
    yield
    idle(llama)
    after = stats(llama)
    assert after.rollouts_finished == before.rollouts_finished
    assert after.tokens_generated == before.tokens_generated
    assert len(one(llama, ids([5]), sampling={"max_tokens": 1}).token_ids) == 1


def violation(call: Callable[[], Any]) -> Violation:
    """The one field that a call was refused for."""
    error = refused(call)
    assert isinstance(error, InvalidArgument), repr(error)
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == Reason.FIELD_INVALID
    (found,) = error.violations
    assert found.field in error.message
    assert "\n" not in error.message
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", 0), ("min_tokens", 17)],
        *[("temperature", value) for value in (-0.1, 2.1, NAN, INF)],
        *[("top_p", value) for value in (0.0, -1.0, 1.1, NAN)],
        *[("min_p", value) for value in (-0.1, 1.1, NAN)],
        *[("presence_penalty", value) for value in (-2.1, 2.1, NAN)],
        *[("frequency_penalty", value) for value in (-2.1, 2.1, NAN)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, NAN, INF)],
        *[("stop", ["x", ""]), ("bad_words", [""]), ("bad_words", [" "])],
        *[("stop_token_ids", [5, 259]), ("stop_token_ids", [2**32 - 1])],
        *[("allowed_token_ids", [259]), ("allowed_token_ids", [2**32 - 1])],
        *[("logit_bias", {259: 1.0}), ("top_logprobs", 21), ("top_logprobs", 2**32 - 1)],
    ],
    ids=str,
)
def test_a_sampling_parameter_out_of_range_is_named(llama: Service, name: str, value: Any) -> None:
    found = violation(lambda: generate(llama, ids([5]), sampling={name: value}))
    assert found.field == f"sampling.{name}"
    assert found.description


@pytest.mark.parametrize("bias", [100.5, -101.0, NAN, INF, -INF])
def test_a_bias_out_of_range_is_named(llama: Service, bias: float) -> None:
    found = violation(lambda: generate(llama, ids([5]), sampling={"logit_bias": {5: 1.0, 6: bias}}))
    assert found.field == "sampling.logit_bias[6]"


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        ({}, ""),
        ({"regex": "(["}, ""),
        ({"json_schema": ""}, ""),
        ({"json_schema": "{"}, ""),
        ({"json_schema": '{"type": "nonsense"}'}, ""),
        ({"grammar": ""}, ""),
        ({"grammar": "root ::= ("}, ""),
        ({"json_schema": "[" * 3000 + "]" * 3000}, ""),
        ({"choice": pb.Choice()}, ".choice.values"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_structured_output_that_makes_no_sense_is_named(
    llama: Service, constraint: dict[str, Any], field: str
) -> None:
    sampling = {"structured_output": pb.StructuredOutput(**constraint)}
    found = violation(lambda: generate(llama, ids([5], 2), ids([6]), sampling=sampling))
    assert found.field == f"sampling.structured_output{field}"


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ([], "prompts"),
        ([ids([5]), pb.Prompt()], "prompts[1]"),
        ([ids([5]), ids([])], "prompts[1]"),
        ([pb.Prompt(text="")], "prompts[0]"),
        ([ids([5]), ids([5, 259])], "prompts[1]"),
        ([ids([2**32 - 1])], "prompts[0]"),
        ([ids([5], 0)], "prompts[0].n"),
        ([ids([5]), ids([5], 2**16 + 1)], "prompts[1].n"),
        ([pb.Prompt(text="x", images=[b"png"])], "prompts[0].images"),
    ],
    ids=["none", "empty", "no-tokens", "no-text", "vocabulary", "uint32", "n-0", "n-large", "images"],
)
def test_a_prompt_that_cannot_be_is_named(llama: Service, prompts: list[pb.Prompt], field: str) -> None:
    assert violation(lambda: generate(llama, *prompts)).field == field


def test_other_fields_are_named(llama: Service) -> None:
    good = ids([5])
    assert violation(lambda: generate(llama, good, output_mode=9)).field == "output_mode"
    assert violation(lambda: generate(llama, good, request_id="x" * 257)).field == "request_id"
    both: dict[str, Any] = {"no_logprobs": True, "sampling": {"top_logprobs": 2}}
    assert violation(lambda: generate(llama, good, **both)).field == "sampling.top_logprobs"
    mode = engine_pb2.PauseRequest(mode=9)
    assert violation(lambda: llama.engine.Pause(mode, timeout=5)).field == "mode"
    assert violation(lambda: llama.inference.Tokenize(pb.TokenizeRequest(), timeout=5)).field == "prompts"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "sequences"),
        ({"sequences": [pb.TokenIds(ids=[5, 6]), pb.TokenIds(ids=[5])]}, "sequences[1]"),
        ({"sequences": [pb.TokenIds()]}, "sequences[0]"),
        ({"sequences": [pb.TokenIds(ids=[5, 259])]}, "sequences[0]"),
        ({"sequences": [pb.TokenIds(ids=[5, 6])], "top_logprobs": 21}, "top_logprobs"),
        ({"sequences": [pb.TokenIds(ids=[5, 6])], "request_id": "x" * 257}, "request_id"),
    ],
    ids=["none", "one-token", "empty", "vocabulary", "top-logprobs", "request-id"],
)
def test_a_score_that_cannot_be_is_named(llama: Service, fields: dict[str, Any], field: str) -> None:
    assert violation(lambda: llama.inference.Score(pb.ScoreRequest(**fields), timeout=10)).field == field


@pytest.mark.parametrize("length", [256, 257, 100_000])
def test_a_prompt_over_the_context_is_refused_with_both_numbers(llama: Service, length: int) -> None:
    error = refused(lambda: generate(llama, ids([5]), ids([5] * length)))
    assert isinstance(error, InvalidArgument)
    assert error.reason == Reason.PROMPT_TOO_LONG
    assert [found.field for found in error.violations] == ["prompts[1]"]
    assert error.metadata == {"num_tokens": str(length), "max_model_len": "256"}
    scored = pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5] * (length + 1))])
    error = refused(lambda: llama.inference.Score(scored, timeout=10))
    assert error.reason == Reason.PROMPT_TOO_LONG
    assert [found.field for found in error.violations] == ["sequences[0]"]


def test_adapters_are_off(llama: Service) -> None:
    for call in (
        lambda: generate(llama, ids([5]), lora="some"),
        lambda: llama.engine.LoadLora(engine_pb2.LoadLoraRequest(name="some", path="/nowhere"), timeout=5),
        lambda: llama.engine.UnloadLora(engine_pb2.UnloadLoraRequest(name="some"), timeout=5),
    ):
        error = refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.LORA_OFF)
        assert "enable_lora" in error.message


def test_an_adapter_that_is_not_loaded_is_not_found(exact: Service) -> None:
    for call in (
        lambda: generate(exact, ids([5]), lora="some"),
        lambda: exact.inference.Score(
            pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6])], lora="some"), timeout=5
        ),
        lambda: exact.engine.UnloadLora(engine_pb2.UnloadLoraRequest(name="some"), timeout=5),
    ):
        error = refused(call)
        assert isinstance(error, NotFound)
        assert (error.reason, error.metadata) == (Reason.LORA_NOT_FOUND, {"lora": "some"})


def test_sleep_is_off(llama: Service) -> None:
    error = refused(lambda: llama.engine.Sleep(engine_pb2.SleepRequest(), timeout=5))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.SLEEP_MODE_OFF)
    assert "enable_sleep_mode" in error.message
    llama.engine.WakeUp(engine_pb2.WakeUpRequest(), timeout=5)  # of one that is awake: nothing to do


def test_a_request_over_the_limit_is_refused(exact: Service) -> None:
    large = request(*[ids([2**20 + 5] * 200) for _ in range(120)])
    assert large.ByteSize() > 65536
    with connect(exact.address) as channel:  # the client's own limit is larger than the service's here
        call = channel.unary_stream("/tandem.inference.v1.InferenceService/Generate")
        error = refused(lambda: call(large.SerializeToString(), timeout=10))
    assert isinstance(error, ResourceExhausted)
    assert error.reason == Reason.MESSAGE_TOO_LARGE
    assert one(exact, ids([5]), sampling={"max_tokens": 1}).token_ids


def test_a_bad_rollout_among_many_ends_the_call_and_its_rollouts(llama: Service) -> None:
    """vLLM finds this one only when the requests are added: what was added before must not go on."""
    sampling = {"structured_output": pb.StructuredOutput(regex="(["), "max_tokens": 250}
    error = refused(lambda: generate(llama, *[ids([5], 8) for _ in range(16)], sampling=sampling))
    assert isinstance(error, InvalidArgument)
