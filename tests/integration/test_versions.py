"""Every token names the version that made it. RestoreCheckpoint stands for an update: the version rises by one, the
weights stay, so that a rollout over several versions must equal one that nothing interrupted.
"""

from __future__ import annotations

from typing import Any

import pytest

from tandem.engine.v1 import engine_pb2
from tandem.errors import Reason
from tandem.inference.v1 import inference_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.integration.calls import (
    LONG,
    Reading,
    generate,
    idle,
    ids,
    joined,
    one,
    pause,
    refused,
    request,
    resume,
    score,
    spans,
    stats,
    until,
)
from tests.services import Service

DELTAS = pb.OUTPUT_MODE_DELTAS


def commit(service: Service) -> int:
    """Make a new version. Its number."""
    return service.weights.RestoreCheckpoint(
        weights_pb2.RestoreCheckpointRequest(), timeout=30
    ).weight_version


def version(service: Service) -> int:
    asked = weights_pb2.GetWeightVersionRequest()
    return service.weights.GetWeightVersion(asked, timeout=5).weight_version


def generated(service: Service) -> int:
    return stats(service).tokens_generated


@pytest.mark.parametrize("clear_cache", [True, False])
def test_spans_change_at_the_very_token(exact: Service, clear_cache: bool) -> None:
    fields: dict[str, Any] = {"sampling": {"temperature": 0} | LONG, "include_text": True}
    prompts = [ids([5 + i, *range(3, 3 + 2 * i)]) for i in range(24)]
    undisturbed = generate(exact, *prompts, **fields)
    for _ in range(5):  # on a busy machine the rollouts may end before we can stop them
        idle(exact)
        first, before = version(exact), generated(exact)
        reading = Reading(exact, request(*prompts, output_mode=DELTAS, **fields))
        until(lambda reading=reading: len(joined(reading.pieces)) == 24, 20, "all rollouts are under way")
        pause(exact, clear_cache=clear_cache)
        try:
            assert stats(exact).state == engine_pb2.SERVING_STATE_PAUSED
            made = generated(exact) - before  # nothing is added to it any more
            until(lambda reading=reading, made=made: reading.num_tokens == made, 5, "what was made is here")
            old = joined(reading.pieces)
            assert commit(exact) == first + 1
            assert reading.num_tokens == made == generated(exact) - before
        finally:
            resume(exact)
        rollouts = joined(reading.end())
        for place, rollout in rollouts.items():
            had = len(old[place].token_ids)
            assert spans(old[place]) == [(first, had)]
            assert spans(rollout) == [(first, had), (first + 1, 200 - had)][: 2 if had < 200 else 1]
            assert rollout.token_ids == undisturbed[place].token_ids
            assert rollout.text == undisturbed[place].text
        if made < 24 * 200:
            return
    pytest.fail("the rollouts were never stopped in the middle")


def test_spans_are_right_over_many_updates_of_many_rollouts(exact: Service) -> None:
    """A hundred rollouts, more than run at once; stop strings end them at different times."""
    sampling = {"seed": 3, "stop": ["e", "A", "zz"], "max_tokens": 200}
    asked = request(*[ids([5, 6 + i], 10) for i in range(10)], sampling=sampling, output_mode=DELTAS)
    for _ in range(5):  # on a busy machine the rollouts may end before we can stop them so often
        idle(exact)
        first, before = version(exact), generated(exact)
        reading = Reading(exact, asked)
        had: list[dict[tuple[int, int], int]] = []

        def goes_on(reading: Reading = reading) -> None:
            seen = reading.num_tokens
            until(lambda: reading.num_tokens > seen + 100 or not reading.running, 20, "rollouts go on")

        def arrived(reading: Reading = reading, before: int = before) -> bool:
            return reading.num_tokens == generated(exact) - before

        for _ in range(6):
            goes_on()
            pause(exact)
            try:
                until(arrived, 5, "what was made has arrived")
                had.append({place: len(r.token_ids) for place, r in joined(reading.pieces).items()})
                commit(exact)
            finally:
                resume(exact)
        rollouts = joined(reading.end())
        assert len(rollouts) == 100
        for place, rollout in rollouts.items():
            ends = [made.get(place, 0) for made in had] + [len(rollout.token_ids)]
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            assert spans(rollout) == [(first + i, count) for i, count in enumerate(counts) if count]
        if max(len(spans(rollout)) for rollout in rollouts.values()) > 3:
            return
    pytest.fail("no rollout met more than two updates")


def test_finished_rollouts_have_the_same_spans(exact: Service) -> None:
    undisturbed = one(exact, ids([9]), sampling={"temperature": 0} | LONG)
    for _ in range(5):  # on a busy machine the rollout may end before we can stop it
        idle(exact)
        first, before = version(exact), generated(exact)
        reading = Reading(exact, request(ids([9]), sampling={"temperature": 0} | LONG))
        until(lambda before=before: generated(exact) > before, 20, "the rollout is under way")
        pause(exact)
        try:
            made = generated(exact) - before
            commit(exact)
        finally:
            resume(exact)
        (rollout,) = reading.end()
        assert rollout.token_ids == undisturbed.token_ids
        assert spans(rollout) == [(first, made), (first + 1, 200 - made)][: 2 if made < 200 else 1]
        if made < 200:
            return
    pytest.fail("the rollout was never stopped in the middle")


def test_commits_without_a_pause_of_ones_own(exact: Service) -> None:
    """Ten versions in the middle of 100 rollouts, more than run at once, that end at different times."""
    fields: dict[str, Any] = {
        "sampling": {"seed": 3, "stop": ["e", "A", "zz"], "max_tokens": 200},
        "include_text": True,
    }
    prompts = [ids([5, 6 + i], 10) for i in range(10)]
    undisturbed = generate(exact, *prompts, **fields)
    for _ in range(5):  # on a busy machine the rollouts may end before they meet so many
        first = version(exact)
        reading = Reading(exact, request(*prompts, output_mode=DELTAS, **fields))
        finished = Reading(exact, request(ids([5], 20), sampling={"seed": 3} | LONG))
        for _ in range(10):
            seen = reading.num_tokens
            until(
                lambda reading=reading, seen=seen: reading.num_tokens > seen or not reading.running,
                20,
                "rollouts go on",
            )
            commit(exact)
        rollouts = list(joined(reading.end()).values()) + finished.end()
        assert len(rollouts) == 120
        assert version(exact) == first + 10
        assert stats(exact).weight_version == first + 10
        seen_versions = set()
        for rollout in rollouts:
            versions = [v for v, _ in spans(rollout)]
            assert versions == sorted(set(versions))
            assert sum(n for _, n in spans(rollout)) == len(rollout.token_ids)
            assert all(n for _, n in spans(rollout))
            seen_versions |= set(versions)
        assert seen_versions <= set(range(first, first + 11))
        again = joined(reading.pieces)
        assert {place: list(r.token_ids) for place, r in again.items()} == {
            place: list(r.token_ids) for place, r in undisturbed.items()
        }
        if max(len(spans(rollout)) for rollout in rollouts) > 3:
            return
    pytest.fail("no rollout met more than two commits")


def test_what_arrives_while_paused_is_of_the_version_it_starts_with(exact: Service) -> None:
    first = version(exact)
    pause(exact)
    try:
        reading = Reading(exact, request(ids([5], 3), sampling=LONG, output_mode=DELTAS))
        until(lambda: stats(exact).num_waiting == 3, 5, "they wait")
        commit(exact)
    finally:
        resume(exact)
    assert [spans(rollout) for rollout in joined(reading.end()).values()] == [[(first + 1, 200)]] * 3


def test_a_call_waits_for_the_version_that_it_needs(exact: Service) -> None:
    first = version(exact)
    reading = Reading(exact, request(ids([5], 3), sampling=LONG, min_weight_version=first + 2))
    scoring = exact.inference.Score(
        pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6, 7])], min_weight_version=first + 2), timeout=60
    )
    for made in (first, first + 1):
        assert spans(one(exact, ids([5]), sampling={"max_tokens": 2}, min_weight_version=first)) == [
            (made, 2)
        ]
        assert reading.running
        assert stats(exact).num_running == stats(exact).num_waiting == 0, "the engine does not know of them"
        commit(exact)
    assert [spans(rollout) for rollout in reading.end()] == [[(first + 2, 200)]] * 3
    assert [score.weight_version for message in scoring for score in message.scores] == [first + 2]


def test_a_call_that_cannot_wait_is_refused(exact: Service) -> None:
    first = version(exact)
    asked = request(ids([5]), min_weight_version=first + 1)
    for nanos in (0, 20_000_000):
        asked.max_version_wait.nanos = nanos
        asked.max_version_wait.SetInParent()
        error = refused(lambda: exact.inference.Generate(asked, timeout=60))
        assert error.reason == Reason.WEIGHTS_TOO_OLD
        assert error.metadata == {"weight_version": str(first), "min_weight_version": str(first + 1)}
    scoring = pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6])], min_weight_version=first + 1)
    scoring.max_version_wait.SetInParent()
    assert refused(lambda: exact.inference.Score(scoring, timeout=60)).reason == Reason.WEIGHTS_TOO_OLD
    asked.max_version_wait.seconds = -1
    error = refused(lambda: exact.inference.Generate(asked, timeout=60))
    assert [found.field for found in error.violations] == ["max_version_wait"]
    asked.ClearField("max_version_wait")
    assert refused(lambda: exact.inference.Generate(asked, timeout=0.5)).reason == Reason.DEADLINE
    idle(exact)


def test_rollouts_that_stop_at_a_commit_are_of_one_version(exact: Service) -> None:
    """Eighty, of which the engine runs 64 at once."""
    fields: dict[str, Any] = {"sampling": {"temperature": 0} | LONG, "on_commit": pb.ON_COMMIT_STOP}
    prompts = [ids([5 + i, *range(3, 3 + i)]) for i in range(80)]
    undisturbed = generate(exact, *prompts, **fields)
    for _ in range(5):  # on a busy machine the rollouts may end before we can stop them
        idle(exact)
        first, before = version(exact), generated(exact)
        reading = Reading(exact, request(*prompts, output_mode=DELTAS, **fields))
        goes_on = Reading(exact, request(ids([9]), sampling={"temperature": 0} | LONG, output_mode=DELTAS))
        until(lambda reading=reading: len(joined(reading.pieces)) >= 60, 20, "most rollouts are under way")
        pause(exact)
        try:
            made = generated(exact) - before
            both = (reading, goes_on)
            until(lambda made=made, both=both: sum(r.num_tokens for r in both) == made, 5, "it is here")
            had = {place: len(r.token_ids) for place, r in joined(reading.pieces).items()}
            commit(exact)
        finally:
            resume(exact)
        rollouts = joined(reading.end())
        assert len(rollouts) == 80
        goes_on.end()
        for place, rollout in rollouts.items():
            count, whole = len(rollout.token_ids), len(undisturbed[place].token_ids)
            stopped = 0 < had.get(place, 0) < whole
            assert rollout.finish_reason == (
                pb.FINISH_REASON_NEW_VERSION if stopped else pb.FINISH_REASON_LENGTH
            )
            assert spans(rollout) == [(first if place in had else first + 1, count)]
            assert count == (had[place] if stopped else whole)
            assert rollout.token_ids == undisturbed[place].token_ids[:count]
        if len(had) < 80 and any(0 < n < len(undisturbed[place].token_ids) for place, n in had.items()):
            (other,) = joined(goes_on.pieces).values()
            assert len(other.token_ids) == 200
            assert other.finish_reason == pb.FINISH_REASON_LENGTH
            return
    pytest.fail("the rollouts were never stopped in the middle")


def test_prompts_have_seeds_of_their_own(exact: Service) -> None:
    """What a seed of the request gives, asked for again in parts."""
    whole = generate(exact, ids([5], 4), ids([6], 3), sampling={"seed": 40} | LONG)
    parts = [ids([6], 2), ids([5]), ids([5], 2)]
    for prompt, seed in zip(parts, (45, 40, 42), strict=True):
        prompt.seed = seed
    again = generate(exact, *parts, sampling={"seed": 7} | LONG)
    same = {(0, 0): (1, 1), (0, 1): (1, 2), (1, 0): (0, 0), (2, 0): (0, 2), (2, 1): (0, 3)}
    assert {place: list(again[place].token_ids) for place in same} == {
        place: list(whole[origin].token_ids) for place, origin in same.items()
    }


def test_no_score_is_of_two_versions(exact: Service) -> None:
    sequences = [[5 + i, *range(3, 253)] for i in range(24)]
    wanted = score(exact, *sequences)
    first = version(exact)
    asked = pb.ScoreRequest(sequences=[pb.TokenIds(ids=tokens) for tokens in sequences])
    call = exact.inference.Score(asked, timeout=60)
    found = []
    for message in call:
        found.extend(message.scores)
        if len(found) < 6:
            commit(exact)
    assert sorted(one.sequence_index for one in found) == list(range(24))
    versions = {one.weight_version for one in found}
    assert versions <= set(range(first, version(exact) + 1))
    for one_score in found:
        logprobs = list(wanted[one_score.sequence_index].logprobs)
        assert list(one_score.logprobs) == pytest.approx(logprobs, abs=1e-4)


def test_cached_prefixes_do_not_outlive_their_version(exact: Service) -> None:
    prompt = list(range(3, 203))
    one(exact, ids(prompt), sampling={"max_tokens": 1})
    assert one(exact, ids(prompt), sampling={"max_tokens": 1}).num_cached_prompt_tokens == 128
    commit(exact)
    assert one(exact, ids(prompt), sampling={"max_tokens": 1}).num_cached_prompt_tokens == 0


def test_seeds_and_grammars_go_on_over_an_update(exact: Service) -> None:
    """What a rollout is made with, beside its tokens, survives that it is stopped and prefilled anew."""
    grammar = pb.StructuredOutput(regex="(abc[0-9]{3};){30}")
    fields: dict[str, Any] = {"sampling": {"seed": 8, "structured_output": grammar, "max_tokens": 250}}
    undisturbed = generate(exact, ids([5], 16), **fields)
    for _ in range(5):  # on a busy machine the rollouts may end before we can stop them
        reading = Reading(exact, request(ids([5], 16), output_mode=DELTAS, **fields))
        until(lambda reading=reading: len(joined(reading.pieces)) == 16, 20, "all rollouts are under way")
        commit(exact)
        seen = reading.num_tokens
        until(
            lambda reading=reading, seen=seen: reading.num_tokens > seen or not reading.running,
            20,
            "they go on",
        )
        commit(exact)
        rollouts = joined(reading.end())
        assert {place: list(r.token_ids) for place, r in rollouts.items()} == {
            place: list(r.token_ids) for place, r in undisturbed.items()
        }
        if any(len(spans(rollout)) == 3 for rollout in rollouts.values()):
            return
    pytest.fail("no rollout was stopped twice")
