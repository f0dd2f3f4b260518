"""What TRL passes to a reward function arrives as it was, by way of the contract's messages."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from tandem.errors import InvalidArgument
from tandem.inference.v1.inference_pb2 import ChatMessage
from tandem.reward.v1 import reward_pb2 as pb
from trainer_service.rewards.messages import arguments, batches, rollouts


def across(
    prompts: list[Any], completions: list[Any], ids: list[list[int]] | None = None, **columns: Any
) -> dict[str, Any]:
    """What a served function gets of what TRL passes."""
    request = pb.ScoreRequest(rollouts=rollouts(prompts, completions, ids, columns), global_step=7)
    found = arguments(pb.ScoreRequest.FromString(request.SerializeToString()))
    assert found.pop("trainer_state").global_step == 7
    return found


def test_texts_and_columns() -> None:
    given = {
        "prompts": ["a", "b"],
        "completions": ["x", ""],
        "completion_ids": [[1, 2**32 - 1], []],
        "answer": ["4", None],
        "number": [4, -(2**53)],
        "share": [0.5, 1.25],
        "right": [True, False],
        "nested": [{"a": [1, {"b": None}]}, {}],
    }
    columns = {
        name: value
        for name, value in given.items()
        if name not in ("prompts", "completions", "completion_ids")
    }
    found = across(given["prompts"], given["completions"], given["completion_ids"], **columns)
    assert found == given
    assert type(found["number"][0]) is int
    assert type(found["right"][0]) is bool


def test_what_trl_adds_for_functions_alone_does_not_travel() -> None:
    found = across(
        ["a"],
        ["x"],
        [[1]],
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
        environments=[object()],
    )
    assert set(found) == {"prompts", "completions", "completion_ids"}


def test_numpys_values_and_dates_travel_as_json_has_them() -> None:
    found = across(
        ["a"], ["x"], [[1]],
        number=np.array([3]), row=[np.arange(2)], day=[datetime.date(2026, 1, 2)], pair=[(1, "b")],
    )  # fmt: skip
    assert (found["number"], found["row"], found["day"], found["pair"]) == (
        [3],
        [[0, 1]],
        ["2026-01-02"],
        [[1, "b"]],
    )


def test_chats_with_every_field() -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "ada"}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    found = across([prompt], [completion], [[1]])
    assert found["prompts"] == [prompt]
    assert found["completions"] == [completion]


def test_keys_that_a_dataset_fills_with_none_are_left_out() -> None:
    found = across(
        [[{"role": "user", "content": "u", "tool_calls": None}]], [[{"role": "assistant", "content": None}]]
    )
    assert found["prompts"] == [[{"role": "user", "content": "u"}]]
    assert found["completions"] == [[{"role": "assistant", "content": ""}]]


def test_pictures_travel_apart_and_once_each() -> None:
    red, blue = Image.new("RGB", (3, 2), "red"), Image.new("RGB", (2, 2), "blue")

    def prompt(*pictures: Image.Image) -> list[dict[str, Any]]:
        parts = [{"type": "image", "image": picture} for picture in pictures]
        return [
            {
                "role": "user",
                "content": [*parts, {"type": "text", "text": "What is"}, {"type": "text", "text": " it?"}],
            }
        ]

    sent = rollouts(
        [prompt(red, blue), prompt(red)],
        ["x", "y"],
        None,
        {"images": [[red, blue], [red]], "image": [red, red]},
    )
    assert [len(rollout.images) for rollout in sent] == [2, 1]
    assert sent[0].images[0] == sent[1].images[0]
    assert "images" not in sent[0].columns.fields
    assert sent[0].prompt.chat.messages[0].content == "What is it?"
    found = arguments(pb.ScoreRequest(rollouts=sent))["prompts"]
    for got, wanted in zip(
        [p["image"] for f in found for p in f[0]["content"][:-2]], [red, blue, red], strict=True
    ):
        assert ImageChops.difference(got, wanted).getbbox() is None
    assert found[0][0]["content"][2:] == [
        {"type": "text", "text": "What is"},
        {"type": "text", "text": " it?"},
    ]


@pytest.mark.parametrize(
    ("columns", "field", "why"),
    [
        ({"x": [1, object()]}, "columns.x[1]", "a object cannot be sent"),
        ({"x": [b"", b""]}, "columns.x[0]", "a bytes cannot be sent"),
        ({"x": [0, float("nan")]}, "columns.x[1]", "nan is no double"),
        ({"x": [0, 2**53 + 1]}, "columns.x[1]", "is no double"),
        ({"x": [{"a": [1, {1}]}, {}]}, "columns.x[0].a[1]", "a set cannot be sent"),
        ({"x": [1]}, "columns.x", "is no list of 2 values"),
        ({"x": 3}, "columns.x", "is no list of 2 values"),
    ],
    ids=["object", "bytes", "nan", "large", "nested", "short", "scalar"],
)
def test_what_has_no_place_in_a_message_is_named(columns: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        rollouts(["a", "b"], ["x", "y"], None, columns)
    assert [v.field for v in caught.value.violations] == [field]
    assert "columns=[...]" in caught.value.message
    assert len(rollouts(["a", "b"], ["x", "y"], None, columns, wanted=[])) == 2


def test_wanted_columns_are_those_that_travel() -> None:
    given = {"a": [1], "b": [object()], "images": [["kept"]]}
    assert set(rollouts(["p"], ["c"], None, given, wanted=["a", "images"])[0].columns.fields) == {
        "a",
        "images",
    }
    with pytest.raises(
        InvalidArgument, match=r"columns\.z: is to be sent, and the dataset has only a, b, images"
    ):
        rollouts(["p"], ["c"], None, given, wanted=["z"])


@pytest.mark.parametrize("prompt", [None, 3, ["text"], {"role": "user"}])
def test_a_prompt_of_another_kind_is_named(prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"prompts\[1\]: is neither a text nor a list of messages"):
        rollouts(["a", prompt], ["x", "y"], None, {})


def test_requests_of_others_are_checked() -> None:
    text = pb.Turn(text="x")
    broken = pb.Turn(chat=pb.Messages(messages=[ChatMessage(role="user")]))
    broken.chat.messages[0].fields.update({"content": [{"type": "image"}]})
    nan = pb.Rollout(prompt=text, completion=text)
    nan.columns.fields["x"].number_value = float("nan")
    for rollout, why in (
        (pb.Rollout(completion=text), r"rollouts\[0\]\.prompt: one of text, chat is required"),
        (pb.Rollout(prompt=text), r"rollouts\[0\]\.completion: one of"),
        (pb.Rollout(prompt=broken, completion=text, images=[b"no picture"]), "cannot read the picture"),
        (nan, r"rollouts\[0\]\.columns"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            arguments(pb.ScoreRequest(rollouts=[rollout]))


def test_columns_of_others_cannot_take_the_place_of_prompts() -> None:
    rollout = pb.Rollout(prompt=pb.Turn(text="p"), completion=pb.Turn(text="c"))
    rollout.columns.update({"prompts": "x", "trainer_state": "y"})
    found = arguments(pb.ScoreRequest(rollouts=[rollout]))
    assert found["prompts"] == ["p"]
    assert found["trainer_state"].global_step == 0


@pytest.mark.parametrize(
    ("size", "max_bytes", "lengths"),
    [(10, 10**6, [5]), (2, 10**6, [2, 2, 1]), (1, 10**6, [1] * 5), (10, 130, [2, 2, 1]), (10, 1, [1] * 5)],
)
def test_batches_hold_no_more_than_they_may(size: int, max_bytes: int, lengths: list[int]) -> None:
    found = [pb.Rollout(prompt=pb.Turn(text=str(i) * 40)) for i in range(5)]
    cut = list(batches(found, size, max_bytes))
    assert [len(part) for part in cut] == lengths
    assert [rollout for part in cut for rollout in part] == found
    assert list(batches([], size, max_bytes)) == []
