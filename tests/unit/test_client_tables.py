"""Tables become messages, and what is wrong with them is told by its path."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tandem.client import job_spec
from tandem.client.requests import generate_request
from tandem.client.tables import message
from tandem.errors import InvalidArgument
from tandem.inference.v1 import inference_pb2
from tandem.trainer.v1 import job_pb2

WHOLE = """
max_retries = 5
[model]
path = "/models/policy"
dtype = "bfloat16"
[model.lora]
rank = 8
target_modules = ["q_proj", "v_proj"]
[dataset]
json_lines = "/data/prompts.jsonl"
columns = { question = "prompt" }
[[rewards]]
function = "rewards:score"
weight = 2
[[rewards]]
service = { address = "unix:///run/reward.sock", timeout_s = 5 }
[inference.managed.engine]
max_model_len = 512
enforce_eager = true
[training]
maxSteps = 10
learning_rate = 1e-6
[grpo]
num_generations = 4
trl_options = { reward_weights = [1.0, 2.0], log_completions = true }
[hardware]
cpu = true
[labels]
team = "a"
"""


def test_a_file_is_the_contract_one_to_one(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(WHOLE)
    spec = job_spec(file)
    assert spec.max_retries == 5
    assert spec.model.lora.rank == 8
    assert list(spec.model.lora.target_modules) == ["q_proj", "v_proj"]
    assert not spec.model.lora.HasField("alpha")
    assert dict(spec.dataset.columns) == {"question": "prompt"}
    assert [reward.WhichOneof("kind") for reward in spec.rewards] == ["function", "service"]
    assert (spec.rewards[0].weight, spec.rewards[1].service.timeout_s) == (2.0, 5.0)
    assert dict(spec.inference.managed.engine) == {"max_model_len": 512, "enforce_eager": True}
    assert spec.training.max_steps == 10
    assert spec.WhichOneof("algorithm") == "grpo"
    assert list(spec.grpo.trl_options["reward_weights"]) == [1.0, 2.0]
    assert spec.hardware.cpu
    assert spec.labels["team"] == "a"
    assert job_spec(str(file)) == spec
    assert job_spec(spec) is spec


def test_json_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"model": {"path": "m"}, "grpo": {"numGenerations": 2, "epsilon": None}}))
    spec = job_spec(file)
    assert (spec.grpo.num_generations, spec.grpo.HasField("epsilon")) == (2, False)


def test_an_empty_table_is_a_choice() -> None:
    spec = job_spec({"inference": {"managed": {}}, "rloo": {}})
    assert spec.inference.WhichOneof("target") == "managed"
    assert spec.WhichOneof("algorithm") == "rloo"


def test_changes_add_to_tables_and_replace_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(WHOLE)
    spec = job_spec(file)
    changed = job_spec(
        file,
        {
            "training.max_steps": 2,
            "training": {"seed": 1},
            "model.lora.target_modules": ["o_proj"],
            "rewards": [{"builtin": "reasoning_gym"}],
            "dataset.reasoning_gym.task": "basic_arithmetic",
            "inference.service": {},
            "rloo": {},
            "labels.run": "b",
        },
    )
    assert (changed.training.max_steps, changed.training.seed) == (2, 1)
    assert changed.training.learning_rate == spec.training.learning_rate
    assert (changed.model.lora.rank, list(changed.model.lora.target_modules)) == (8, ["o_proj"])
    assert [reward.WhichOneof("kind") for reward in changed.rewards] == ["builtin"]
    # Of what is one of several, the new one takes the old one's place.
    assert changed.dataset.WhichOneof("source") == "reasoning_gym"
    assert dict(changed.dataset.columns) == dict(spec.dataset.columns)
    assert changed.inference.WhichOneof("target") == "service"
    assert changed.WhichOneof("algorithm") == "rloo"
    assert dict(changed.labels) == {"team": "a", "run": "b"}
    assert job_spec(spec, {"training.max_steps": 2}).training.max_steps == 2
    assert spec == job_spec(file, {})  # what is given stays


def test_changes_empty_lists_and_remove_what_is_none(tmp_path: Path) -> None:
    """Neither shows in a message: both would leave what was there."""
    file = tmp_path / "job.toml"
    file.write_text(WHOLE)
    spec = job_spec(file)
    assert spec.rewards
    assert spec.model.lora.target_modules
    assert spec.training.HasField("max_steps")
    changes = {
        "rewards": [],
        "model.lora": {"target_modules": [], "rank": None},
        "training.max_steps": None,
        "labels": {},
        "grpo.trl_options.seed": None,
    }
    changed = job_spec(file, changes)
    assert not changed.rewards
    assert changed.model.HasField("lora")
    assert changed.model.lora == job_pb2.Lora()
    assert not changed.training.HasField("max_steps")
    assert dict(changed.labels) == dict(spec.labels)
    assert changed.grpo.trl_options["seed"] is None
    assert job_spec(file, {"hardware": None, "nash_md": {}}).WhichOneof("algorithm") == "nash_md"
    assert spec == job_spec(file)


def test_changes_reach_into_what_the_contract_does_not_know() -> None:
    table = {"grpo": {"trl_options": {"a": {"b": 1, "c": 2}, "d": [1, 2], "e": 1}}}
    changes = {"grpo.trl_options.a.b": 3, "grpo.trl_options": {"d": [4], "e": {}, "f": "g"}}
    options = dict(job_spec(table, changes).grpo.trl_options)
    assert dict(options.pop("a")) == {"b": 3, "c": 2}
    assert list(options.pop("d")) == [4]
    assert dict(options.pop("e")) == {}
    assert options == {"f": "g"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training.max_stepz": 1}, "job.training.max_stepz"),
        ({"training.max_steps": "two"}, "job.training.max_steps"),
        ({"training": 1}, "job.training"),
        ({"max_retries.x": 1}, "job.max_retries"),
        ({"": 1}, "job."),
    ],
)
def test_a_change_that_cannot_be_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        job_spec({"grpo": {}}, changes)
    assert [v.field for v in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("table", "field", "text"),
    [
        ({"modle": {}}, "job.modle", "there is no such field; did you mean model?"),
        ({"zzz": 1}, "job.zzz", "there is no such field"),
        ({"model": {"pth": "x"}}, "job.model.pth", "there is no such field; did you mean path?"),
        ({"model": "x"}, "job.model", "must be a table, is 'x'"),
        ({"model": {"path": 3}}, "job.model.path", "must be text, is 3"),
        ({"model": {"path": "\ud800"}}, "job.model.path", "is out of range: '\\ud800'"),
        ({"max_retries": True}, "job.max_retries", "must be a whole number, is True"),
        ({"max_retries": 1.0}, "job.max_retries", "must be a whole number, is 1.0"),
        ({"max_retries": -1}, "job.max_retries", "is out of range: -1"),
        ({"max_retries": 2**32}, "job.max_retries", f"is out of range: {2**32}"),
        (
            {"training": {"learning_rate": "fast"}},
            "job.training.learning_rate",
            "must be a number, is 'fast'",
        ),
        ({"training": {"learning_rate": True}}, "job.training.learning_rate", "must be a number, is True"),
        ({"hardware": {"cpu": 1}}, "job.hardware.cpu", "must be true or false, is 1"),
        ({"rewards": {"builtin": "x"}}, "job.rewards", "must be a list, is {'builtin': 'x'}"),
        ({"rewards": "x"}, "job.rewards", "must be a list, is 'x'"),
        ({"rewards": ["x"]}, "job.rewards[0]", "must be a table, is 'x'"),
        (
            {"rewards": [{}, {"builtn": "x"}]},
            "job.rewards[1].builtn",
            "there is no such field; did you mean builtin?",
        ),
        (
            {"rewards": [{"builtin": "x", "model": "y"}]},
            "job.rewards[0].model",
            "is given beside builtin: one of them goes",
        ),
        ({"grpo": {}, "xpo": {}}, "job.xpo", "is given beside grpo: one of them goes"),
        (
            {"max_retries": 1, "maxRetries": 2},
            "job.maxRetries",
            "is given beside max_retries: one of them goes",
        ),
        ({"labels": ["x"]}, "job.labels", "must be a table, is ['x']"),
        ({"labels": {"a": 1}}, "job.labels.a", "must be text, is 1"),
        ({"labels": {1: "a"}}, "job.labels.1", "must be text, is 1"),
        ({"training": {"report_to": [1]}}, "job.training.report_to[0]", "must be text, is 1"),
        (
            {"grpo": {"trl_options": {"a": [{"b": datetime.date(2026, 1, 1)}]}}},
            "job.grpo.trl_options.a[0].b",
            "must be text, a number, true or false, a list or a table, is datetime.date(2026, 1, 1)",
        ),
        (
            {"grpo": {"trl_options": {"a": 2**60}}},
            "job.grpo.trl_options.a",
            f"is too large to be sent exactly: {2**60}",
        ),
        (
            {"grpo": {"trl_options": {"a": float("inf")}}},
            "job.grpo.trl_options.a",
            "must be a finite number, is inf",
        ),
        ({"grpo": {"trl_options": {2: 1}}}, "job.grpo.trl_options", "has a name that is no text: 2"),
        ({"grpo": {"trl_options": 1}}, "job.grpo.trl_options", "must be a table, is 1"),
    ],
)
def test_what_is_wrong_is_named(table: dict[str, Any], field: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        job_spec(table)
    assert [(v.field, v.description) for v in caught.value.violations] == [(field, text)]


def test_all_of_it_is_named_at_once() -> None:
    with pytest.raises(InvalidArgument, match=r"job\.model\.pth: .*, and 2 more") as caught:
        job_spec({"model": {"pth": "x"}, "max_retries": "x", "rewards": [{"weight": None}, 3]})
    assert [v.field for v in caught.value.violations] == [
        "job.model.pth",
        "job.max_retries",
        "job.rewards[1]",
    ]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("job.toml", None, "No such file or directory"),
        ("job.toml", b"model = ", r"cannot read .*job\.toml: Invalid value"),
        ("job.toml", b"\xff", "invalid start byte"),
        ("job.json", b"{", r"cannot read .*job\.json: Expecting"),
        ("job.json", b"[]", "holds no table"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(
    tmp_path: Path, name: str, content: bytes | None, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=text) as caught:
        job_spec(tmp_path / name)
    assert caught.value.violations[0].field == "job"


def test_what_is_no_job_at_all_is_a_bug_of_the_caller() -> None:
    with pytest.raises(TypeError, match="a job is a JobSpec, a table or a path, not int"):
        job_spec(3)  # type: ignore[arg-type]


def test_keys_that_are_numbers_may_be_text() -> None:
    params = message(inference_pb2.SamplingParams, {"logit_bias": {"7": -1, 9: 2.5}}, "sampling")
    assert dict(params.logit_bias) == {7: -1.0, 9: 2.5}


def request(prompts: Any, n: int = 1, **sampling: Any) -> inference_pb2.GenerateRequest:
    return generate_request(
        prompts, sampling, n=n, lora="", logprobs=False, mode=inference_pb2.OUTPUT_MODE_FINISHED
    )


def test_one_prompt_or_several_of_each_kind() -> None:
    chat = [{"role": "user", "content": "hi", "name": "me"}]
    own = inference_pb2.Prompt(text="c", n=3)
    one = [request(prompt, n=2).prompts for prompt in ("a", [1, 2], chat, own)]
    assert [len(prompts) for prompts in one] == [1, 1, 1, 1]
    several = request(["a", [1, 2], chat, own], n=2).prompts
    assert list(several) == [prompts[0] for prompts in one]
    assert [prompt.WhichOneof("input") for prompt in several] == ["text", "token_ids", "chat", "text"]
    assert [prompt.n for prompt in several] == [2, 2, 2, 3]
    assert several[2].chat.messages[0].fields["name"] == "me"
    assert own.n == 3


@pytest.mark.parametrize(
    ("prompts", "sampling", "field"),
    [
        ([], {}, "prompts"),
        ("a", {"n": 0}, "n"),
        ("a", {"n": True}, "n"),
        ([[]], {}, "prompts[0]"),
        (["a", 3], {}, "prompts[1]"),
        ([[1, "b"]], {}, "prompts[0].ids[1]"),
        ([[-1]], {}, "prompts[0].ids[0]"),
        ([[{"role": "user"}, "b"]], {}, "prompts[0][1]"),
        ([{"role": 3}], {}, "prompts[0][0].role"),
        ("a", {"temprature": 1}, "sampling.temprature"),
        ("a", {"max_tokens": "many"}, "sampling.max_tokens"),
        ("a", {"stop": "x"}, "sampling.stop"),
    ],
)
def test_a_malformed_prompt_is_named(prompts: Any, sampling: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        request(prompts, **sampling)
    assert [v.field for v in caught.value.violations] == [field]


def test_every_field_of_the_contract_has_a_type_that_tables_know() -> None:
    """A new kind of field, such as an enum, needs a rule of its own."""
    from tandem.client.tables import _WORDS

    def leaves(descriptor: Any, seen: set[str]) -> set[int]:
        if descriptor.full_name in seen or descriptor.full_name == "google.protobuf.Struct":
            return set()
        seen.add(descriptor.full_name)
        found = set()
        for field in descriptor.fields:
            found |= leaves(field.message_type, seen) if field.message_type else {field.cpp_type}
        return found

    used = leaves(job_pb2.JobSpec.DESCRIPTOR, set()) | leaves(inference_pb2.SamplingParams.DESCRIPTOR, set())
    assert used <= set(_WORDS)
