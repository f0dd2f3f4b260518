"""Rollouts of the mixture of policy and reference are of exactly that distribution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.errors import Reason
from tandem.inference.v1 import inference_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.integration.calls import Reading, generate, ids, joined, refused, request, until
from tests.services import Service

COEFFICIENTS = [0.0, 0.3, 0.5, 1.0]
PROMPTS = [list(range(5, 5 + length)) for length in (1, 2, 7, 30, 100)]


@pytest.fixture(scope="module")
def pair(checkpoints: dict[str, Path], reference: Path) -> list[Any]:
    """Policy and reference in float32."""
    return [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (checkpoints["llama"], reference)
    ]


@torch.no_grad()
def mixture(pair: list[Any], sequence: list[int], coefficient: float) -> torch.Tensor:
    """Logits after each token of `sequence`: (tokens, vocabulary)."""
    policy, other = (model(torch.tensor([sequence])).logits[0] for model in pair)
    return (1 - coefficient) * policy + coefficient * other  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_mixtures(mixed: Service, pair: list[Any], temperature: float) -> None:
    """Four mixtures of sequences that begin and end at different times, more than run at once."""
    sampling = {"max_tokens": 60, "temperature": temperature, "stop_token_ids": [40, 41, 42, 43, 44, 45]}
    readings = {
        coefficient: Reading(
            mixed,
            request(
                *[ids(prompt, 3) for prompt in PROMPTS],
                sampling=sampling | {"mixture_coef": coefficient, "seed": 1},
                output_mode=pb.OUTPUT_MODE_DELTAS,
            ),
        )
        for coefficient in COEFFICIENTS
    }
    lengths = set()
    for coefficient, reading in readings.items():
        rollouts = joined(reading.end())
        assert reading.error is None
        assert len(rollouts) == 15
        for (prompt, _), rollout in rollouts.items():
            tokens = list(rollout.token_ids)
            logits = mixture(pair, PROMPTS[prompt] + tokens, coefficient)[len(PROMPTS[prompt]) - 1 : -1]
            wanted = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert list(rollout.logprobs) == pytest.approx(wanted.tolist(), abs=2e-3)
            lengths.add(len(tokens))
    assert len(lengths) > 5, "they ended at different times"


def test_samples_have_the_mixtures_frequencies(mixed: Service, pair: list[Any]) -> None:
    """Pearson's chi-squared over all sequences of two of five tokens; the seed is fixed."""
    allowed, prompt, count = [10, 20, 30, 40, 50], PROMPTS[2], 4000
    sampling = {"max_tokens": 2, "seed": 5, "allowed_token_ids": allowed, "mixture_coef": 0.5}
    rollouts = generate(mixed, ids(prompt, count), sampling=sampling, no_logprobs=True)
    seen = [tuple(rollout.token_ids) for rollout in rollouts.values()]
    firsts = mixture(pair, prompt, 0.5)[-1][allowed].softmax(0)
    statistic = 0.0
    for first, one in zip(allowed, firsts.tolist(), strict=True):
        seconds = mixture(pair, [*prompt, first], 0.5)[-1][allowed].softmax(0)
        for second, two in zip(allowed, seconds.tolist(), strict=True):
            expected = count * one * two
            statistic += (seen.count((first, second)) - expected) ** 2 / expected
    assert statistic < 51.2, "the 99.9 % quantile at 24 degrees of freedom"


def test_greedy_is_the_mixtures_best_token(mixed: Service, pair: list[Any]) -> None:
    sampling = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "mixture_coef": 0.5}
    for (prompt, _), rollout in generate(
        mixed, *[ids(prompt) for prompt in PROMPTS], sampling=sampling
    ).items():
        tokens = list(rollout.token_ids)
        logits = mixture(pair, PROMPTS[prompt] + tokens, 0.5)[len(PROMPTS[prompt]) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_it_goes_on_over_an_update(mixed: Service) -> None:
    """The engine prefills anew what an update stopped, and the reference does."""
    fields: dict[str, Any] = {
        "sampling": {"seed": 8, "ignore_eos": True, "max_tokens": 200, "mixture_coef": 0.5}
    }
    prompts = [ids(prompt, 2) for prompt in PROMPTS[:3]]
    undisturbed = generate(mixed, *prompts, **fields)
    for _ in range(5):  # on a busy machine the rollouts may end before we can stop them
        reading = Reading(mixed, request(*prompts, output_mode=pb.OUTPUT_MODE_DELTAS, **fields))
        until(lambda reading=reading: len(joined(reading.pieces)) == 6, 20, "all rollouts are under way")
        mixed.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)
        rollouts = joined(reading.end())
        assert {place: list(r.token_ids) for place, r in rollouts.items()} == {
            place: list(r.token_ids) for place, r in undisturbed.items()
        }
        if any(len(rollout.version_spans) > 1 for rollout in rollouts.values()):
            return
    pytest.fail("no rollout was stopped")


def test_constraints_hold(mixed: Service) -> None:
    """What the policy may not write, a mixture may not either, and the reference alone may not."""
    output = pb.StructuredOutput(regex="[ab]{12}")
    for coefficient in (0.5, 1.0):
        sampling = {"structured_output": output, "max_tokens": 30, "mixture_coef": coefficient}
        for rollout in generate(mixed, ids(PROMPTS[1], 4), sampling=sampling, include_text=True).values():
            assert len(rollout.text) == 12
            assert set(rollout.text) <= set("ab")
            assert all(math.isfinite(logprob) for logprob in rollout.logprobs)


def test_who_asks_for_what_cannot_be_is_told(mixed: Service, exact: Service) -> None:
    def error(service: Service, **sampling: Any) -> Any:
        return refused(lambda: service.inference.Generate(request(ids([5]), sampling=sampling), timeout=10))

    for wrong in (-0.1, 1.1, math.nan):
        refusal = error(mixed, mixture_coef=wrong)
        assert refusal.reason == Reason.FIELD_INVALID
        assert refusal.violations[0].field == "sampling.mixture_coef"
    refusal = error(mixed, mixture_coef=0.5, logit_bias={5: 1.0})
    assert refusal.violations[0].field == "sampling.logit_bias"
    refusal = error(exact, mixture_coef=0.5)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.REFERENCE_OFF)
    assert generate(mixed, ids([5]), sampling={"mixture_coef": 0.0}), "none is no mixture"


def test_what_is_served_says_so(mixed: Service, exact: Service, reference: Path) -> None:
    asked = pb.GetModelRequest()
    assert mixed.inference.GetModel(asked, timeout=5).reference_model == str(reference)
    assert exact.inference.GetModel(asked, timeout=5).reference_model == ""
