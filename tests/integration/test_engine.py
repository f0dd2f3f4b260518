"""EngineService: pauses, caches, counters."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import grpc
import pytest

from tandem.engine.v1 import engine_pb2
from tandem.inference.v1 import inference_pb2 as pb
from tests.integration.calls import (
    LONG,
    Reading,
    generate,
    idle,
    ids,
    joined,
    one,
    pause,
    request,
    resume,
    stats,
    until,
)
from tests.services import Service

DELTAS = pb.OUTPUT_MODE_DELTAS
GREEDY = {"temperature": 0} | LONG


@pytest.fixture(autouse=True)
def _resumed(llama: Service) -> Iterator[None]:
    idle(llama)
    yield
    resume(llama)
    idle(llama)
    assert stats(llama).state == engine_pb2.SERVING_STATE_SERVING


@contextlib.contextmanager
def under_way(service: Service, *prompts: pb.Prompt) -> Iterator[Reading]:
    """Rollouts of 200 tokens of which some have begun."""
    reading = Reading(service, request(*prompts, sampling=GREEDY, output_mode=DELTAS))
    until(lambda: reading.pieces, 20, "rollouts are under way")
    yield reading
    reading.call.cancel()


def state(service: Service) -> str:
    return engine_pb2.ServingState.Name(stats(service).state).removeprefix("SERVING_STATE_")


def holds(service: Service) -> bool:
    """Whether it has rollouts that have not ended."""
    now = stats(service)
    return now.num_running + now.num_waiting > 0


def quiet(service: Service) -> bool:
    """Whether nothing is sampled for a moment."""
    made = stats(service).tokens_generated
    time.sleep(0.1)
    return stats(service).tokens_generated == made


def test_keep_freezes_rollouts(llama: Service) -> None:
    prompts = [ids([5, 6, i]) for i in range(3, 23)]  # 20: eight run, twelve wait
    undisturbed = generate(llama, *prompts, sampling=GREEDY)
    for _ in range(5):  # on a busy machine they may end before we can stop them
        with under_way(llama, *prompts) as reading:
            pause(llama, "KEEP")
            assert state(llama) == "PAUSED"
            assert llama.health() == "SERVING"  # whoever asks is answered, later
            made, kept = stats(llama).tokens_generated, holds(llama)
            time.sleep(0.5)
            assert stats(llama).tokens_generated == made
            assert reading.running or not kept
            resume(llama)
            assert state(llama) == "SERVING"
            rollouts = joined(reading.end())
        assert {k: list(r.token_ids) for k, r in rollouts.items()} == {
            k: list(r.token_ids) for k, r in undisturbed.items()
        }
        if kept:
            return
    pytest.fail("the rollouts were never stopped in the middle")


def test_wait_lets_what_runs_end(llama: Service) -> None:
    with under_way(llama, *[ids([5, 6, i]) for i in range(3, 9)]) as reading:
        pause(llama, "WAIT")
        assert state(llama) == "PAUSED"
        rollouts = joined(reading.end(seconds=5))
        assert {len(rollout.token_ids) for rollout in rollouts.values()} == {200}
        assert {rollout.finish_reason for rollout in rollouts.values()} == {pb.FINISH_REASON_LENGTH}


def test_abort_ends_what_runs_with_the_tokens_it_has(llama: Service) -> None:
    prompts = [ids([5, 6, i]) for i in range(3, 51)]
    undisturbed = generate(llama, *prompts, sampling=GREEDY)
    with under_way(llama, *prompts) as reading:
        finished = Reading(llama, request(*prompts, sampling=GREEDY))
        until(lambda: stats(llama).num_waiting > 48, 10, "both calls are there")
        pause(llama, "ABORT")
        deltas, whole = joined(reading.end(seconds=5)), joined(finished.end(seconds=5))
    for rollouts in (deltas, whole):
        assert len(rollouts) == 48
        for place, rollout in rollouts.items():
            had = len(rollout.token_ids)
            assert rollout.token_ids == undisturbed[place].token_ids[:had]
            assert len(rollout.logprobs) == had == sum(span.num_tokens for span in rollout.version_spans)
            assert rollout.finish_reason in (pb.FINISH_REASON_ABORTED, pb.FINISH_REASON_LENGTH)
            assert had == 200 or rollout.finish_reason == pb.FINISH_REASON_ABORTED
    lengths = [len(rollout.token_ids) for rollout in [*deltas.values(), *whole.values()]]
    assert lengths.count(0) >= 20  # which waited
    assert any(0 < length < 200 for length in lengths)  # which ran


@pytest.mark.parametrize("mode", ["KEEP", "WAIT", "ABORT"])
def test_requests_that_arrive_while_paused_wait(llama: Service, mode: str) -> None:
    pause(llama, mode)
    reading = Reading(llama, request(ids([5], 3), sampling=GREEDY))
    until(lambda: stats(llama).num_waiting == 3, 5, "they wait")
    scores = llama.inference.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6, 7])]), timeout=30)
    time.sleep(0.3)
    assert reading.running
    assert not reading.pieces
    resume(llama)
    assert [len(rollout.token_ids) for rollout in reading.end(seconds=10)] == [200] * 3
    assert [len(score.logprobs) for message in scores for score in message.scores] == [2]


def test_a_score_outlives_an_aborting_pause(llama: Service) -> None:
    """It has no tokens that could be handed over: it is made again."""
    pause(llama)
    scores = llama.inference.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6, 7])] * 3), timeout=30)
    until(lambda: stats(llama).num_waiting == 3, 5, "they wait")
    pause(llama, "ABORT")
    resume(llama)
    assert [len(score.logprobs) for message in scores for score in message.scores] == [2] * 3


def test_callers_may_leave_while_paused(llama: Service) -> None:
    pause(llama)
    readings = [Reading(llama, request(ids([5], 10), sampling=GREEDY)) for _ in range(3)]
    until(lambda: stats(llama).num_waiting == 30, 5, "they wait")
    for reading in readings:
        reading.call.cancel()
    until(lambda: stats(llama).num_waiting == 0, 5, "they are gone")
    assert state(llama) == "PAUSED"


def test_pause_and_resume_can_be_repeated(llama: Service) -> None:
    for _ in range(3):
        pause(llama)
    resume(llama)  # one is enough
    assert len(one(llama, ids([5]), sampling=GREEDY).token_ids) == 200
    resume(llama)
    for mode in ("KEEP", "WAIT", "ABORT", "KEEP", "ABORT", "WAIT"):
        pause(llama, mode)
    resume(llama)
    assert len(one(llama, ids([5]), sampling=GREEDY).token_ids) == 200


@pytest.mark.parametrize("paused", [False, True])
def test_a_pause_that_is_given_up_leaves_things_as_they_were(llama: Service, paused: bool) -> None:
    """WAIT takes as long as the rollouts do. Who does not wait for it has not paused."""
    for _ in range(5):  # on a busy machine they may end too soon
        with under_way(llama, *[ids([5, 6, i]) for i in range(3, 11)]) as reading:
            if paused:
                pause(llama, clear_cache=False)
            given_up = llama.engine.Pause.future(
                engine_pb2.PauseRequest(mode=engine_pb2.PAUSE_MODE_WAIT), timeout=0.03
            )
            if given_up.exception() is None:
                resume(llama)
                continue
            assert given_up.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            if not paused:
                until(lambda: state(llama) == "SERVING", 10, "nobody holds generation")
                assert {len(rollout.token_ids) for rollout in joined(reading.end()).values()} == {200}
                return
            until(lambda: quiet(llama), 10, "what runs is stopped again")
            made = stats(llama).tokens_generated
            time.sleep(0.3)
            assert state(llama) == "PAUSED"
            assert stats(llama).tokens_generated == made
            if reading.running:
                return
        resume(llama)
    pytest.fail("no pause had to wait")


def test_control_is_for_one_at_a_time_and_nobody_gets_stuck(llama: Service) -> None:
    """Pause and Resume from many callers at once, while rollouts come and go."""
    prompts = [ids([5, i]) for i in range(3, 19)]
    reading = Reading(llama, request(*prompts, sampling=GREEDY, output_mode=DELTAS))
    calls: list[grpc.Future] = []
    for i in range(40):
        mode = engine_pb2.PauseMode.Value(("PAUSE_MODE_KEEP", "PAUSE_MODE_WAIT")[i % 2])
        calls.append(llama.engine.Pause.future(engine_pb2.PauseRequest(mode=mode), timeout=30))
        calls.append(llama.engine.Resume.future(engine_pb2.ResumeRequest(), timeout=30))
        calls.append(llama.engine.ResetPrefixCache.future(engine_pb2.ResetPrefixCacheRequest(), timeout=30))
    for i, call in enumerate(calls):
        # A WAIT is over when another call decides otherwise about the rollouts.
        if (error := call.exception()) is not None:
            assert (i % 6, error.code()) == (3, grpc.StatusCode.ABORTED)
    resume(llama)
    assert {len(rollout.token_ids) for rollout in joined(reading.end()).values()} == {200}


def test_the_prefix_cache_is_not_reset_under_running_rollouts(llama: Service) -> None:
    reset = engine_pb2.ResetPrefixCacheRequest()
    for _ in range(5):  # on a busy machine they may end before we can stop them
        with under_way(llama, ids(list(range(3, 50)), 32)):
            pause(llama, clear_cache=False)
            kept = holds(llama)
            done = llama.engine.ResetPrefixCache(reset, timeout=5).reset
            assert not (kept and done)
        until(lambda: llama.engine.ResetPrefixCache(reset, timeout=5).reset, 5, "nothing holds a block")
        if kept:
            return
        resume(llama)
    pytest.fail("the rollouts were never stopped in the middle")


def test_the_cache_is_dropped_by_a_pause_unless_it_shall_stay(llama: Service) -> None:
    prompt = ids(list(range(3, 203)))
    one(llama, prompt, sampling={"max_tokens": 1})
    pause(llama, clear_cache=False)
    resume(llama)
    assert one(llama, prompt, sampling={"max_tokens": 1}).num_cached_prompt_tokens == 128
    pause(llama)
    resume(llama)
    assert one(llama, prompt, sampling={"max_tokens": 1}).num_cached_prompt_tokens == 0


def test_load_shows_while_it_lasts(llama: Service) -> None:
    for _ in range(5):  # on a busy machine most may end before we look
        with under_way(llama, ids([5, 6], 40)) as reading:
            looks = []
            while reading.running and not (looks and looks[-1].num_running == 8):
                looks.append(stats(llama))
        idle(llama)
        if looks and looks[-1].num_running == 8 and looks[-1].num_waiting:
            assert 0 < looks[-1].kv_cache_usage <= 1
            assert looks[-1].state == engine_pb2.SERVING_STATE_SERVING
            return
    pytest.fail("eight of forty rollouts never ran while others waited")
