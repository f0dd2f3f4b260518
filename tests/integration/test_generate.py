"""What Generate, Tokenize and GetModel answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument, Reason
from tandem.inference.v1 import inference_pb2 as pb
from tests.integration.calls import LONG, generate, idle, ids, one, refused, request, stats
from tests.services import Service

TEXT = "Hello, wörld! 123"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 40}


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def tokenize(service: Service, *prompts: pb.Prompt) -> list[list[int]]:
    answer = service.inference.Tokenize(pb.TokenizeRequest(prompts=prompts), timeout=10)
    return [list(prompt.ids) for prompt in answer.prompts]


def struct(**fields: Any) -> Struct:
    made = Struct()
    made.update(fields)
    return made


def chat(*messages: tuple[str, str], **fields: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=said) for role, said in messages], **fields)


def test_the_model_is_told(llama: Service, checkpoints: dict[str, Path]) -> None:
    model = llama.inference.GetModel(pb.GetModelRequest(), timeout=5)
    assert model.model == str(checkpoints["llama"])
    assert model.engine_id
    assert model.state == engine_pb2.SERVING_STATE_SERVING
    assert (model.max_model_len, model.vocab_size, model.dtype) == (256, 259, "bfloat16")
    assert (model.logprobs_mode, model.max_logprobs) == ("processed_logprobs", 20)
    assert model.weight_version >= 1
    assert model.vllm_version


def test_text_is_tokenized_as_the_tokenizer_does(llama: Service, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [TEXT, "a", "\n\n", "日本"]
    assert tokenize(llama, *[pb.Prompt(text=text) for text in texts]) == [
        tokenizer(t)["input_ids"] for t in texts
    ]


def test_one_prompt_can_be_given_in_three_ways(llama: Service, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = chat(("user", TEXT))
    (rendered,) = tokenize(llama, pb.Prompt(chat=talk))
    text = tokenizer.decode(rendered)
    rollouts = generate(
        llama,
        pb.Prompt(chat=talk),
        pb.Prompt(text=text),
        ids(rendered),
        sampling=GREEDY,
        include_prompt_token_ids=True,
    )
    assert [list(rollouts[i, 0].prompt_token_ids) for i in range(3)] == [rendered] * 3
    assert rollouts[0, 0].token_ids == rollouts[1, 0].token_ids == rollouts[2, 0].token_ids


# With its keys in order: a Struct has none, so that the service sorts them.
TOOL = {"function": {"name": "add", "parameters": {"maximum": 3, "required": ["a"]}}, "type": "function"}
SHOUT = (
    "{% for m in messages %}{{ m.content | upper }}{{ m.mood }};{% endfor %}{{ tools | tojson }}{{ depth }}"
)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": True}, {"add_generation_prompt": True}),
        ({"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ({"template": "{{ messages[0]['content'] }}?"}, {"chat_template": "{{ messages[0]['content'] }}?"}),
        (
            {"template": SHOUT, "tools": [struct(**TOOL)], "template_kwargs": struct(depth=7, list=[1.5])},
            {"chat_template": SHOUT, "tools": [TOOL], "depth": 7, "list": [1.5]},
        ),
        (
            {"template": "{% if tools %}with{% else %}without{% endif %}"},
            {"chat_template": "without"},
        ),
    ],
    ids=["default", "opened", "closed", "template", "variables", "no-tools"],
)
def test_chats_are_rendered_as_the_tokenizer_does(
    exact: Service, tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    talk = chat(("system", "be"), ("user", "hi"), **fields)
    talk.messages[1].fields.update({"mood": {"happy": [True, None, 2]}})
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi", "mood": {"happy": [True, None, 2]}},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)[
        "input_ids"
    ]
    assert tokenize(exact, pb.Prompt(chat=talk)) == [rendered]


@pytest.mark.parametrize(
    ("talk", "field", "says"),
    [
        (pb.Chat(), "prompts[1].chat.messages", "at least one"),
        (chat(("", "hi")), "prompts[1].chat.messages[0].role", "required"),
        (
            chat(("user", "x"), template="{{ raise_exception('be polite') }}"),
            "prompts[1].chat.template",
            "be polite",
        ),
        (chat(("user", "x"), template="{% for %}"), "prompts[1].chat.template", "Expected"),
        (chat(("user", "x"), template="{{ 1 / 0 }}"), "prompts[1].chat.template", "division"),
        (chat(("user", "x"), template="{{ messages.append(1) }}"), "prompts[1].chat.template", "unsafe|safe"),
        (
            chat(("user", "x"), template_kwargs=struct(tokenize=False)),
            "prompts[1].chat.template_kwargs",
            "tokenize",
        ),
        (
            chat(("user", "x"), template_kwargs=struct(messages=[])),
            "prompts[1].chat.template_kwargs",
            "messages",
        ),
        (
            chat(("user", "x"), template_kwargs=struct(depth=float("nan"))),
            "prompts[1].chat.template_kwargs",
            "depth|NaN|nan",
        ),
        (chat(("user", "x"), tools=[struct(), struct(a=float("inf"))]), "prompts[1].chat.tools[1]", ""),
    ],
    ids=["empty", "role", "raises", "syntax", "fails", "unsafe", "taken", "messages", "nan", "tools"],
)
def test_a_chat_that_cannot_be_rendered_is_named(
    exact: Service, talk: pb.Chat, field: str, says: str
) -> None:
    prompts = [ids([5]), pb.Prompt(chat=talk)]
    before = stats(exact).rollouts_finished
    for call in (
        lambda: exact.inference.Tokenize(pb.TokenizeRequest(prompts=prompts), timeout=10),
        lambda: exact.inference.Generate(request(*prompts), timeout=10),
    ):
        error = refused(call)
        assert isinstance(error, InvalidArgument)
        assert error.reason == Reason.FIELD_INVALID
        assert [violation.field for violation in error.violations] == [field]
        assert any(part in error.violations[0].description for part in says.split("|"))
    assert stats(exact).rollouts_finished == before  # not even the good prompt ran


def test_text_is_what_the_tokens_decode_to(llama: Service, tokenizer: PreTrainedTokenizerFast) -> None:
    forced = {"allowed_token_ids": [1, 2, 70, 71, 200], "seed": 3, "ignore_eos": True, "max_tokens": 60}
    plain, special, none = (
        one(llama, ids([9]), sampling=forced | more, include_text=text)
        for more, text in [({}, True), ({"skip_special_tokens": False}, True), ({}, False)]
    )
    assert plain.token_ids == special.token_ids == none.token_ids
    assert plain.text == tokenizer.decode(list(plain.token_ids), skip_special_tokens=True)
    assert special.text == tokenizer.decode(list(plain.token_ids))
    assert "<eos>" in special.text
    assert "<eos>" not in plain.text
    assert not none.text


def test_the_prompts_tokens_come_with_rollout_0_alone_and_only_if_asked(llama: Service) -> None:
    prompts = [ids([5, 6], 3), ids([7], 2)]
    asked = generate(llama, *prompts, sampling=LONG, include_prompt_token_ids=True)
    assert {place for place, rollout in asked.items() if rollout.prompt_token_ids} == {(0, 0), (1, 0)}
    assert list(asked[0, 0].prompt_token_ids) == [5, 6]
    assert not any(rollout.prompt_token_ids for rollout in generate(llama, *prompts, sampling=LONG).values())


def test_each_prompt_has_its_own_number_of_rollouts(llama: Service) -> None:
    rollouts = generate(llama, ids([5], 3), ids([6]), ids([7], 2), sampling={"max_tokens": 2})
    assert sorted(rollouts) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


def test_defaults_are_vllms(llama: Service) -> None:
    rollout = one(llama, ids([5, 6]), sampling={"ignore_eos": True})
    assert len(rollout.token_ids) == 16
    assert rollout.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(rollout.logprobs) == 16


def test_a_rollout_ends_at_the_end_of_sequence_token(llama: Service) -> None:
    only = {"allowed_token_ids": [1, 70], "max_tokens": 100, "seed": 1}
    rollout = one(llama, ids([5]), sampling=only | {"logit_bias": {70: 0.0, 1: 0.0}})
    assert rollout.finish_reason == pb.FINISH_REASON_STOP
    assert rollout.WhichOneof("stop_cause") is None
    assert rollout.token_ids[-1] == 1
    assert 1 not in rollout.token_ids[:-1]
    at_least = one(llama, ids([5]), sampling=only | {"min_tokens": 50})
    assert 1 not in at_least.token_ids[:50]
    on = one(llama, ids([5]), sampling=only | {"ignore_eos": True})
    assert on.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(on.token_ids) == 100
    assert 1 in on.token_ids


def test_a_rollout_ends_at_a_stop_token(llama: Service) -> None:
    sampling = {"allowed_token_ids": [70, 71, 72], "max_tokens": 200, "seed": 1}
    rollout = one(llama, ids([5]), sampling=sampling | {"stop_token_ids": [72, 200]})
    assert rollout.finish_reason == pb.FINISH_REASON_STOP
    assert rollout.WhichOneof("stop_cause") == "stop_token_id"
    assert rollout.stop_token_id == rollout.token_ids[-1] == 72
    assert 72 not in rollout.token_ids[:-1]


@pytest.mark.parametrize("include_text", [True, False])
def test_a_rollout_ends_at_a_stop_string(
    llama: Service, tokenizer: PreTrainedTokenizerFast, include_text: bool
) -> None:
    free = one(llama, ids([5]), sampling=GREEDY, include_text=True)
    text = tokenizer.decode(list(free.token_ids))
    at = next(i for i in range(8, len(text)) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    rollout = one(
        llama, ids([5]), sampling=GREEDY | {"stop": ["never there", stop]}, include_text=include_text
    )
    assert rollout.finish_reason == pb.FINISH_REASON_STOP
    assert rollout.WhichOneof("stop_cause") == "stop_string"
    assert rollout.stop_string == stop
    assert rollout.token_ids == free.token_ids[: len(rollout.token_ids)]
    assert tokenizer.decode(list(rollout.token_ids)).startswith(
        text[:at] + stop
    )  # the ids have the stop string
    assert rollout.text == (text[:at] if include_text else "")  # the text does not
    assert len(rollout.logprobs) == len(rollout.token_ids)


def test_a_rollout_ends_with_the_context(llama: Service) -> None:
    rollout = one(llama, ids(list(range(3, 203))), sampling={"ignore_eos": True, "max_tokens": 1000})
    assert rollout.finish_reason == pb.FINISH_REASON_LENGTH
    assert len(rollout.token_ids) == 256 - 200


def test_identical_prompts_share_their_prefill(llama: Service) -> None:
    llama.engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest(), timeout=5)
    before = stats(llama)
    prompt = [7, *range(30, 230)]  # one whole block of 128, and a part of the next
    rollouts = generate(llama, ids(prompt, 4), ids(prompt, 4), sampling={"max_tokens": 3})
    cached = sorted(rollout.num_cached_prompt_tokens for rollout in rollouts.values())
    assert cached == [0] + [128] * 7
    after = stats(llama)
    assert after.prefix_cache_hits - before.prefix_cache_hits == 7 * 128
    assert after.prefix_cache_queries - before.prefix_cache_queries == 8 * len(prompt)
    assert llama.engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest(), timeout=5).reset
    assert one(llama, ids(prompt), sampling={"max_tokens": 1}).num_cached_prompt_tokens == 0


def test_counters_count(llama: Service) -> None:
    before = stats(llama)
    generate(llama, ids([5], 3), ids([6], 2), sampling=LONG)
    after = stats(llama)
    assert after.rollouts_finished - before.rollouts_finished == 5
    assert after.tokens_generated - before.tokens_generated == 5 * 200
    assert after.event_loop_lag.ToTimedelta().total_seconds() < 5
    idle(llama)
