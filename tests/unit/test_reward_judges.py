"""Judges, and the reward functions that they are made."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import pytest

from tandem.errors import InvalidArgument, Reason
from tests import rewards
from trainer_service.rewards import EngineJudge, JudgeReward, PairwiseJudge, RewardJudge
from trainer_service.rewards import judge as named
from trainer_service.rewards.engine_judge import _flat

PROMPTS = ["p", "q", "r"]
#: The first completion of each prompt, then the second.
BLOCKS = ["aaa", "b", "cc", "a", "bbb", "cc"]


class Told:
    """Says what the test says, and remembers what it was asked."""

    def __init__(self, says: Any) -> None:
        self.says = says
        self.asked: list[Any] = []

    def judge(
        self, prompts: Sequence[Any], completions: Sequence[Any], shuffle_order: bool = True, **more: Any
    ) -> Any:
        self.asked.append((list(prompts), [list(pair) for pair in completions], shuffle_order, more))
        return self.says


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_trl_has_no_judges_any_more() -> None:
    import trl

    assert "judge" not in str(trl._import_structure).lower()
    assert importlib.util.find_spec("trl.experimental.judges") is None


def test_the_better_one_earns_one() -> None:
    judge = Told([0, 1, 0])
    function = JudgeReward(judge)
    assert function(PROMPTS * 2, BLOCKS, [[1]] * 6, trainer_state=None) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert judge.asked == [(PROMPTS, [["aaa", "a"], ["b", "bbb"], ["cc", "cc"]], True, {})]
    assert function.__name__ == "Told"


def test_probabilities_are_earned_as_they_are() -> None:
    judge = Told([0.75, 0.0, 1.0])
    function = JudgeReward(judge, probabilities=True, shuffle_order=False, name="wins")
    assert function(PROMPTS * 2, BLOCKS) == [0.75, 0.0, 1.0, 0.25, 1.0, 0.0]
    assert judge.asked[0][2:] == (False, {"return_scores": True})
    assert function.__name__ == "wins"


@pytest.mark.parametrize(
    ("says", "probabilities", "why"),
    [
        ([0, 1, -1], False, r"Told\[2\] is -1.0, and has to be 0 or 1"),
        ([0, 2, 0], False, r"Told\[1\] is 2.0"),
        ([0, 0.5, 0], False, r"Told\[1\] is 0.5"),
        ([0, None, 0], False, r"Told\[1\] is None"),
        ([0, 1], False, "returned 2 rewards for 3 completions"),
        (None, False, "returned None"),
        ([0.5, 1.5, 0.1], True, r"Told\[1\] is 1.5, and has to be a probability"),
        ([0.5, math.nan, 0.1], True, r"Told\[1\] is nan"),
    ],
)
def test_a_verdict_that_is_none_is_named(says: Any, probabilities: bool, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as caught:
        JudgeReward(Told(says), probabilities=probabilities)(PROMPTS * 2, BLOCKS)
    assert caught.value.reason is Reason.REWARD_INVALID


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [(["p", "p", "q", "q"], list("abcd")), (["p"] * 3, list("abc")), (["p"], ["a", "b"])],
    ids=["by prompt", "odd", "fewer prompts"],
)
def test_completions_that_are_no_pairs_in_blocks_are_refused(
    prompts: list[str], completions: list[str]
) -> None:
    judge = Told([0, 0])
    with pytest.raises(InvalidArgument, match="OnlineDPOTrainer"):
        JudgeReward(judge)(prompts, completions)
    assert judge.asked == []


@pytest.mark.parametrize("judge", [None, Told, lambda: None, "judge"], ids=rewards.shown)
def test_what_cannot_judge_is_refused(judge: Any) -> None:
    with pytest.raises(InvalidArgument, match="judge: is an object with a method"):
        JudgeReward(judge)


def scored(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [
        len(prompt) + float(len(completion)) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def test_a_judge_by_rewards() -> None:
    judge = RewardJudge(scored)
    assert isinstance(judge, PairwiseJudge)
    pairs = [["aaa", "a"], ["b", "bbb"], ["cc", "cc"]]
    assert judge.judge(PROMPTS, pairs) == [0, 1, 0]
    chances = judge.judge(PROMPTS, pairs, return_scores=True)
    assert chances == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5])
    assert JudgeReward(judge)(PROMPTS * 2, BLOCKS) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    chances = judge.judge(["p"], [["x" * 2000, ""]], return_scores=True)
    assert chances == [1.0]
    assert judge.judge(["p"], [["", "x" * 2000]], return_scores=True) == [0.0]


def test_a_judge_by_rewards_needs_one_of_each() -> None:
    with pytest.raises(InvalidArgument, match="has no opinion on completion 1"):
        RewardJudge(lambda completions, **_: [1.0, None]).judge(["p"], [["a", "b"]])
    with pytest.raises(InvalidArgument, match=r"\[0\] is nan"):
        RewardJudge(lambda completions, **_: [math.nan, 1.0]).judge(["p"], [["a", "b"]])
    with pytest.raises(InvalidArgument, match="awaited is async"):
        RewardJudge(rewards.awaited)


@pytest.mark.parametrize(
    "question", ["{prompt} {first}", "{prompt} {first} {second} {third}", "{prompt} {first} {second} {", "{}"]
)
def test_a_question_without_the_three_is_refused(question: str) -> None:
    with pytest.raises(InvalidArgument, match=r"question: .*\{second\}"):
        EngineJudge(None, question=question)  # type: ignore[arg-type]


def test_what_the_model_is_shown() -> None:
    judge = EngineJudge(None, system="Judge.", question="{prompt}|{first}|{second}")  # type: ignore[arg-type]
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    assert judge._chat(chat, [{"role": "assistant", "content": "{x}"}], "y") == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "user: a\n\nassistant: b|{x}|y"},
    ]
    assert _flat([{"role": "assistant", "content": None}]) == ""
    assert [m["role"] for m in EngineJudge(None, system="")._chat("p", "a", "b")] == ["user"]  # type: ignore[arg-type]


THE_ONE = Told([0])


@pytest.mark.parametrize(
    ("spec", "arguments", "kind"),
    [
        ("reward", {"reward_func": "tests.rewards:length"}, RewardJudge),
        ("reward", {"reward_func": "get_repetition_penalty_reward(ngram_size=2)"}, RewardJudge),
        ("engine", {"address": "unix:///tmp/s", "system": "Judge.", "timeout_s": 3}, EngineJudge),
        (f"{__name__}:Told", {"says": [1]}, Told),
        (f"{__name__}:THE_ONE", None, Told),
        (THE_ONE, None, Told),
    ],
    ids=rewards.shown,
)
def test_a_judge_by_name(spec: Any, arguments: dict[str, Any] | None, kind: type) -> None:
    assert isinstance(named(spec, arguments), kind)


@pytest.mark.parametrize(
    ("spec", "arguments", "why"),
    [
        ("nobody", {}, "'nobody' is no judge's name: give engine, reward or module:attribute"),
        ("engine", {}, "needs the address"),
        ("engine", {"address": "nowhere"}, "the judge engine: address: 'nowhere' has no port"),
        ("engine", {"address": "unix:///tmp/s", "token_file": "/no/such"}, "cannot read /no/such"),
        (
            "engine",
            {"address": "unix:///tmp/s", "temperature": 1},
            "unexpected keyword argument 'temperature'",
        ),
        ("engine", {"address": "unix:///tmp/s", "question": "?"}, "question: needs"),
        ("reward", {}, "missing 1 required positional argument"),
        ("reward", {"reward_func": "owner/model"}, "is no function, but str"),
        ("reward", {"reward_func": "tests.rewards:nothing"}, "tests.rewards has no nothing"),
        ("tests.rewards:nothing", {}, "tests.rewards has no nothing"),
        ("tests.rewards:ROOT", {}, "is neither a judge nor makes one"),
        (f"{__name__}:Told", {}, "missing 1 required positional argument: 'says'"),
        (f"{__name__}:THE_ONE", {"x": 1}, "is a judge by itself"),
        (f"{__name__}:_flat", {"text": "x"}, "is no judge: it has no method"),
        (3, {}, "3 is no judge"),
    ],
)
def test_what_is_no_judge_is_told(spec: Any, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        named(spec, arguments, field="judge.name")
    assert why in str(caught.value)
    assert [v.field for v in caught.value.violations] == ["judge.name"]
