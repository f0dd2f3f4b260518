"""Logprobs are those of the distribution that was sampled from, and sampling does what its parameters say.

On a float32 engine against transformers in float32: what differs is the order of additions, some 1e-5 here.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument
from tandem.inference.v1 import inference_pb2 as pb
from tests.integration.calls import LONG, Rollouts, generate, idle, ids, one, refused, score
from tests.services import Service

CLOSE = 1e-4
PROMPTS = [[5], [9, 8], [40, 41, 42, 43, 44], list(range(3, 53)), list(range(100, 250)), list(range(20, 220))]


class Model:
    """transformers' own forward in float32."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def logits(self, sequence: list[int], start: int) -> torch.Tensor:
        """[tokens from `start` on, vocabulary], float64: of each token, before it is known."""
        return self.model(torch.tensor([sequence])).logits[0, start - 1 : -1].double()


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Model:
    return Model(checkpoints["llama"])


def distribution(logits: torch.Tensor, sampling: dict[str, Any]) -> torch.Tensor:
    """Logprobs of the distribution that `sampling` makes of `logits`, by the parameters' definitions."""
    logits = logits / sampling.get("temperature", 1.0)
    probs = logits.softmax(-1)
    if min_p := sampling.get("min_p"):
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    if top_k := sampling.get("top_k"):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p := sampling.get("top_p"):
        probs, order = logits.softmax(-1).sort(descending=True)
        beyond = probs.cumsum(-1) - probs >= top_p  # the fewest tokens that together reach top_p stay
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.log_softmax(-1)


def of_tokens(logprobs: torch.Tensor, tokens: Any) -> torch.Tensor:
    return logprobs.gather(-1, torch.tensor(list(tokens))[:, None])[:, 0]


def apart(found: Any, wanted: torch.Tensor) -> float:
    """The largest difference; infinite ones must be so on both sides."""
    found = torch.tensor(list(found)).double().view(wanted.shape)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    return float((found - wanted)[wanted.isfinite()].abs().max())


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_sampling_distribution(
    exact: Service, model: Model, sampling: dict[str, Any]
) -> None:
    k = 8
    rollouts = generate(
        exact,
        *[ids(tokens) for tokens in PROMPTS],
        sampling=sampling | {"seed": 7, "max_tokens": 24, "ignore_eos": True, "top_logprobs": k},
    )
    for index, tokens in enumerate(PROMPTS):
        rollout = rollouts[index, 0]
        whole = [*tokens, *rollout.token_ids]
        wanted = distribution(model.logits(whole, len(tokens)), sampling)
        assert apart(rollout.logprobs, of_tokens(wanted, rollout.token_ids)) < CLOSE
        # Row after row, the most probable first, with their own logprobs.
        top = rollout.top_logprobs
        assert top.k == k
        assert len(top.token_ids) == len(top.logprobs) == k * len(rollout.token_ids) == k * 24
        assert apart(top.logprobs, wanted.topk(k).values) < CLOSE
        rows = torch.tensor(list(top.token_ids)).view(-1, k)
        assert apart(top.logprobs, wanted.gather(-1, rows)) < CLOSE


def test_greedy_logprobs_are_the_models_own(exact: Service, model: Model) -> None:
    rollout = one(exact, ids(PROMPTS[2]), sampling={"temperature": 0} | LONG)
    logits = model.logits([*PROMPTS[2], *rollout.token_ids], len(PROMPTS[2]))
    assert list(rollout.token_ids) == logits.argmax(-1).tolist()
    assert apart(rollout.logprobs, of_tokens(logits.log_softmax(-1), rollout.token_ids)) < CLOSE


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"]
)
def test_logprobs_contain_penalties_and_biases(exact: Service, model: Model, name: str) -> None:
    bias = {30: 4.0, 31: -2.5, 200: 100.0 / 16}
    value: Any = bias if name == "logit_bias" else 1.5
    prompt = PROMPTS[2]
    rollout = one(exact, ids(prompt), sampling={name: value, "seed": 1, "temperature": 0.8} | LONG)
    logits = model.logits([*prompt, *rollout.token_ids], len(prompt))
    for position, row in enumerate(logits):
        written = torch.tensor(rollout.token_ids[:position], dtype=torch.long)
        if name == "repetition_penalty":
            seen = torch.cat([torch.tensor(prompt), written]).unique()
            row[seen] = torch.where(row[seen] > 0, row[seen] / value, row[seen] * value)
        elif name == "presence_penalty":
            row[written.unique()] -= value
        elif name == "frequency_penalty":
            row -= value * torch.bincount(written, minlength=len(row))
        else:
            for token, more in bias.items():
                row[token] += more
    wanted = distribution(logits, {"temperature": 0.8})
    assert apart(rollout.logprobs, of_tokens(wanted, rollout.token_ids)) < CLOSE


def test_scores_are_the_models_own_logprobs(exact: Service, model: Model) -> None:
    sequences = [tokens for tokens in PROMPTS if len(tokens) > 1] + [[7, 7], list(range(3, 258))]
    for tokens, found in zip(sequences, score(exact, *sequences, top_logprobs=5), strict=True):
        wanted = model.logits(tokens, 1).log_softmax(-1)
        assert apart(found.logprobs, of_tokens(wanted, tokens[1:])) < CLOSE
        assert found.top_logprobs.k == 5
        assert apart(found.top_logprobs.logprobs, wanted.topk(5).values) < CLOSE
        rows = torch.tensor(list(found.top_logprobs.token_ids)).view(-1, 5)
        assert apart(found.top_logprobs.logprobs, wanted.gather(-1, rows)) < CLOSE


def test_a_score_is_of_temperature_1_and_costs_no_cached_prefix(exact: Service) -> None:
    rollout = one(exact, ids(PROMPTS[3]), sampling={"seed": 2, "max_tokens": 40, "ignore_eos": True})
    whole = [*PROMPTS[3], *rollout.token_ids]
    first, again = score(exact, whole)[0], score(exact, whole)[0]
    assert list(first.logprobs) == pytest.approx(list(again.logprobs), abs=CLOSE)
    assert apart(rollout.logprobs, torch.tensor(list(first.logprobs[len(PROMPTS[3]) - 1 :])).double()) < CLOSE


def test_logprobs_can_be_left_out(exact: Service) -> None:
    fields: dict[str, Any] = {"sampling": {"seed": 3, "max_tokens": 20}}
    without = one(exact, ids(PROMPTS[2]), no_logprobs=True, **fields)
    beside = one(exact, ids(PROMPTS[2]), **fields)
    assert without.token_ids == beside.token_ids
    assert len(beside.logprobs) == len(beside.token_ids)
    assert not without.logprobs
    assert not beside.HasField("top_logprobs")


def sampled(service: Service, *prompts: list[int], n: int, seed: int, **more: Any) -> Rollouts:
    return generate(service, *[ids(p, n) for p in prompts], sampling=dict(seed=seed, **LONG) | more)


def test_a_seed_makes_a_call_repeatable(exact: Service) -> None:
    first = sampled(exact, PROMPTS[0], PROMPTS[3], n=3, seed=11)
    again = sampled(exact, PROMPTS[0], PROMPTS[3], n=3, seed=11)
    other = sampled(exact, PROMPTS[0], PROMPTS[3], n=3, seed=12)
    assert {k: list(r.token_ids) for k, r in first.items()} == {
        k: list(r.token_ids) for k, r in again.items()
    }
    for place, rollout in first.items():
        assert list(rollout.logprobs) == pytest.approx(list(again[place].logprobs), abs=CLOSE)
    assert all(first[k].token_ids != other[k].token_ids for k in first)


def test_the_logprobs_of_a_seeded_call_are_the_same_to_the_last_bit(exact: Service) -> None:
    """Its rollouts begin together: what each is computed beside does not depend on how fast they come in."""
    prompts = [[50 + i, *range(3, 3 + 9 * i)] for i in range(16)]
    runs = []
    for _ in range(6):
        exact.engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest(), timeout=30)
        rollouts = sampled(exact, *prompts, n=2, seed=17, max_tokens=12)
        runs.append({place: list(rollout.logprobs) for place, rollout in rollouts.items()})
    assert all(run == runs[0] for run in runs)


def test_the_kth_rollout_of_a_call_samples_with_seed_plus_k(exact: Service) -> None:
    together = sampled(exact, PROMPTS[0], PROMPTS[3], n=3, seed=2**64 - 3)  # k counts over all prompts
    for k, (place, rollout) in enumerate(sorted(together.items())):
        seed = (2**64 - 3 + k) % 2**63
        alone = sampled(exact, [PROMPTS[0], PROMPTS[3]][place[0]], n=1, seed=seed)[0, 0]
        assert rollout.token_ids == alone.token_ids


def test_a_seed_holds_where_a_prefill_is_cut_in_pieces(exact: Service) -> None:
    # The ten prompts have more tokens than a step may (512): some are prefilled in two pieces.
    prompts = [[50 + i, *range(3, 203)] for i in range(10)]
    together = sampled(exact, *prompts, n=1, seed=5, max_tokens=16)
    for k, prompt in enumerate(prompts):
        assert (
            together[k, 0].token_ids == sampled(exact, prompt, n=1, seed=5 + k, max_tokens=16)[0, 0].token_ids
        )


def test_rollouts_of_a_group_differ_without_a_seed(exact: Service) -> None:
    rollouts = generate(exact, ids(PROMPTS[0], 8), ids(PROMPTS[0], 8), sampling=LONG)
    assert sorted(rollouts) == list(itertools.product(range(2), range(8)))
    assert len({tuple(rollout.token_ids) for rollout in rollouts.values()}) == 16


def test_sampling_follows_its_distribution(exact: Service, model: Model) -> None:
    """2,000 first tokens against their probabilities: a chi-squared statistic far beyond its spread fails."""
    probs = model.logits([*PROMPTS[2], 0], len(PROMPTS[2]))[0].div(0.5).softmax(-1)
    n = 2000
    rollouts = generate(
        exact, ids(PROMPTS[2], n), sampling={"max_tokens": 1, "temperature": 0.5, "seed": 1}, no_logprobs=True
    )
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in rollouts.values()]), minlength=len(probs))
    often = probs * n >= 5
    seen = torch.cat([counts[often].double(), counts[~often].sum()[None].double()])
    expected = torch.cat([probs[often], probs[~often].sum()[None]]) * n
    freedom = len(seen) - 1
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert freedom > 10
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_only_allowed_tokens_are_sampled(exact: Service) -> None:
    rollouts = generate(exact, ids(PROMPTS[0], 4), sampling={"allowed_token_ids": [70, 71, 72]} | LONG)
    assert {token for rollout in rollouts.values() for token in rollout.token_ids} == {70, 71, 72}


def test_biases_force_and_forbid_tokens(exact: Service) -> None:
    forced = one(exact, ids(PROMPTS[0]), sampling={"logit_bias": {77: 100.0}} | LONG)
    assert set(forced.token_ids) == {77}
    free = generate(exact, ids(PROMPTS[0], 4), sampling=LONG)
    usual = max(range(259), key=[t for r in free.values() for t in r.token_ids].count)
    forbidden = generate(exact, ids(PROMPTS[0], 4), sampling={"logit_bias": {usual: -100.0}} | LONG)
    assert usual not in {token for rollout in forbidden.values() for token in rollout.token_ids}


def test_bad_words_are_not_written(exact: Service) -> None:
    fields: dict[str, Any] = {"include_text": True}
    free = one(exact, ids(PROMPTS[0]), sampling={"temperature": 0} | LONG, **fields)
    words = re.findall("[A-Za-z]{2}", free.text)
    assert words
    without = one(
        exact, ids(PROMPTS[0]), sampling={"temperature": 0, "bad_words": words[:1]} | LONG, **fields
    )
    assert words[0] not in without.text
    assert free.text != without.text


@pytest.mark.parametrize(
    ("constraint", "matches"),
    [
        ({"regex": r"(ab|cd){2,4}-[0-9]{3}"}, lambda text: re.fullmatch(r"(ab|cd){2,4}-[0-9]{3}", text)),
        ({"choice": pb.Choice(values=["yes", "no", "maybe"])}, lambda text: text in {"yes", "no", "maybe"}),
        ({"grammar": 'root ::= "x" | "(" root ")"'}, lambda text: re.fullmatch(r"(\(*)x(\)*)", text)),
        (
            {
                "json_schema": json.dumps(
                    {
                        "type": "object",
                        "properties": {"a": {"type": "integer"}, "b": {"enum": ["u", "v"]}},
                        "required": ["a", "b"],
                        "additionalProperties": False,
                    }
                )
            },
            lambda text: set(json.loads(text)) == {"a", "b"} and json.loads(text)["b"] in {"u", "v"},
        ),
    ],
    ids=["regex", "choice", "grammar", "json_schema"],
)
def test_structured_output_matches(exact: Service, constraint: dict[str, Any], matches: Any) -> None:
    rollouts = generate(
        exact,
        ids(PROMPTS[0], 6),
        sampling={"structured_output": pb.StructuredOutput(**constraint), "max_tokens": 150, "seed": 4},
        include_text=True,
    )
    ended = [rollout for rollout in rollouts.values() if rollout.finish_reason == pb.FINISH_REASON_STOP]
    assert len(ended) >= 4  # a number may go on for as long as it likes
    assert all(matches(rollout.text) for rollout in ended)


@pytest.mark.parametrize(
    "constraint",
    [{"json_schema": '{"$ref": "#"}'}, {"grammar": "root ::= root | root root"}],
    ids=["json_schema", "grammar"],
)
def test_a_structured_output_that_nothing_fulfils_is_named(
    exact: Service, constraint: dict[str, Any]
) -> None:
    """It passes vLLM's check. Who was told to try again would do so for ever."""
    sampling = {"structured_output": pb.StructuredOutput(**constraint)}
    error = refused(lambda: generate(exact, ids([5], 2), ids([6]), sampling=sampling))
    assert isinstance(error, InvalidArgument)
    assert [found.field for found in error.violations] == ["sampling.structured_output"]
    idle(exact)
    assert len(one(exact, ids([5]), sampling={"max_tokens": 1}).token_ids) == 1
