"""Streams: deltas, message sizes, slow readers, and callers that leave."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from transformers import AutoTokenizer

from tandem.errors import DeadlineExceeded, Reason, ResourceExhausted
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tandem.rpc import connect
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


def deltas(service: Service, *prompts: pb.Prompt, **fields: Any) -> list[pb.Rollout]:
    reading = Reading(service, request(*prompts, output_mode=DELTAS, **fields))
    pieces = reading.end()
    assert reading.error is None
    return pieces


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": {"seed": 5, "top_logprobs": 3} | LONG},
        {"sampling": {"seed": 5, "max_tokens": 100}, "include_text": True, "include_prompt_token_ids": True},
        {"sampling": {"temperature": 0, "stop": ["e", "qq"]} | LONG, "include_text": True},
        {"sampling": {"seed": 5, "allowed_token_ids": list(range(100, 259))} | LONG, "include_text": True},
        {"sampling": {"seed": 5, "max_tokens": 1}},
        {"sampling": {"seed": 5} | LONG, "no_logprobs": True},
    ],
    ids=["logprobs", "text", "stop-string", "split-characters", "one-token", "no-logprobs"],
)
def test_deltas_make_up_the_finished_rollouts(exact: Service, fields: dict[str, Any]) -> None:
    prompts = [ids([5], 3), ids(list(range(3, 150)), 2)]
    whole = generate(exact, *prompts, **fields)
    pieces = deltas(exact, *prompts, **fields)
    together = joined(pieces)
    if fields["sampling"]["max_tokens"] > 1:
        assert len(pieces) > 3 * len(whole)  # they did come bit by bit
    assert together.keys() == whole.keys()
    for place, rollout in whole.items():
        assert list(together[place].logprobs) == pytest.approx(list(rollout.logprobs), abs=1e-4)
        top, top_together = rollout.top_logprobs.logprobs, together[place].top_logprobs.logprobs
        assert list(top_together) == pytest.approx(list(top), abs=1e-4)
        for found in (rollout, together[place]):
            found.num_cached_prompt_tokens = 0  # the second call finds more in the cache
            del found.logprobs[:], found.top_logprobs.logprobs[:]
        assert together[place] == rollout
    for piece in pieces:
        assert sum(span.num_tokens for span in piece.version_spans) == len(piece.token_ids)
        assert len(piece.logprobs) == (0 if fields.get("no_logprobs") else len(piece.token_ids))
        k = fields["sampling"].get("top_logprobs", 0)
        assert len(piece.top_logprobs.token_ids) == k * len(piece.token_ids)
    firsts = {(piece.prompt_index, piece.rollout_index): piece for piece in reversed(pieces)}
    asked = fields.get("include_prompt_token_ids", False)
    assert [piece for piece in pieces if piece.prompt_token_ids] == (
        [piece for piece in pieces if any(piece is firsts[i, 0] for i in range(2))] if asked else []
    )


def test_text_never_shows_half_a_character(exact: Service, checkpoints: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    snowman = tokenizer("☃")["input_ids"]
    assert len(snowman) == 3
    regex = {"structured_output": pb.StructuredOutput(regex="☃{40}"), "max_tokens": 200}
    for _ in range(5):  # on a busy machine tokens may come together
        pieces = deltas(exact, ids([5]), sampling=regex, include_text=True)
        assert {character for piece in pieces for character in piece.text} == {"☃"}
        assert joined(pieces)[0, 0].text == "☃" * 40
        if len(pieces) > 40:
            return
    pytest.fail("no piece ended within a character")


def test_the_first_token_comes_before_the_last(exact: Service) -> None:
    for _ in range(5):  # on a busy machine we may see the first only when all are there
        reading = Reading(exact, request(ids([5]), sampling=LONG, output_mode=DELTAS))
        until(lambda reading=reading: reading.pieces, 20, "a first piece")
        seen = reading.num_tokens
        assert len(reading.pieces[0].token_ids) < 200
        assert not reading.pieces[0].finish_reason
        (rollout,) = joined(reading.end()).values()
        assert len(rollout.token_ids) == 200
        assert rollout.finish_reason == pb.FINISH_REASON_LENGTH
        if seen < 200:
            return
    pytest.fail("the last token was always there with the first")


@pytest.mark.parametrize(
    ("prompts", "n", "top_logprobs"),
    [(100, 50, 0), (4, 64, 64)],  # 64 run at once, and of the second kind a step's take more than a message
    ids=["5000", "large"],
)
def test_rollouts_come_in_messages_under_the_limit(
    exact: Service, prompts: int, n: int, top_logprobs: int
) -> None:
    """64 KiB is this service's limit."""
    sampling = {"max_tokens": 3, "seed": 1, "ignore_eos": True, "top_logprobs": top_logprobs}
    asked = request(*[ids([5, 6, 7, 8], n) for _ in range(prompts)], sampling=sampling, include_text=True)
    places: set[tuple[int, int]] = set()
    sizes = []
    for message in exact.inference.Generate(asked, timeout=120):
        sizes.append(message.ByteSize())
        for rollout in message.rollouts:
            place = rollout.prompt_index, rollout.rollout_index
            assert place not in places
            assert rollout.finish_reason
            assert len(rollout.logprobs) == len(rollout.token_ids) == 3
            places.add(place)
    assert places == {(i, j) for i in range(prompts) for j in range(n)}
    assert max(sizes) <= 65536
    assert sum(sizes) > 3 * 65536
    if top_logprobs:
        assert max(sizes) > 32768
    idle(exact)


def test_scores_come_in_messages_under_the_limit(exact: Service) -> None:
    sequences = [[5, *range(3, 253)] for _ in range(40)]
    asked = pb.ScoreRequest(sequences=[pb.TokenIds(ids=s) for s in sequences], top_logprobs=20)
    sizes = [message.ByteSize() for message in exact.inference.Score(asked, timeout=60)]
    assert max(sizes) <= 65536
    assert sum(sizes) > 10 * 65536
    assert len(score(exact, *sequences)) == 40


def test_what_alone_is_larger_than_a_message_is_an_error(exact: Service) -> None:
    sampling = {"top_logprobs": 259} | LONG
    for call in (
        lambda: exact.inference.Generate(request(ids([5]), sampling=sampling), timeout=30),
        lambda: exact.inference.Score(
            pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5] * 200)], top_logprobs=259), timeout=30
        ),
    ):
        error = refused(call)
        assert isinstance(error, ResourceExhausted)
        assert error.reason == Reason.MESSAGE_TOO_LARGE
        assert "65536" in error.message
    # In pieces it fits.
    pieces = deltas(exact, ids([5]), sampling=sampling)
    assert len(joined(pieces)[0, 0].top_logprobs.token_ids) == 259 * 200
    idle(exact)


@pytest.fixture
def narrow(exact: Service) -> Iterator[InferenceServiceStub]:
    """A client that takes little at a time, so that its reader need not be slow for long to hold the service up."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]
    with connect(exact.address, extra_options=options) as channel:
        yield InferenceServiceStub(channel)


def test_a_slow_reader_holds_up_nobody_but_itself(exact: Service, narrow: InferenceServiceStub) -> None:
    """It reads one message of a large answer and then none: the rest waits in the service, and others go on."""
    memory = psutil.Process(exact.process.pid).memory_info
    idle(exact)
    before, generated = memory().rss, stats(exact).tokens_generated
    asked = request(*[ids([5], 64) for _ in range(4)], sampling=LONG | {"top_logprobs": 20})
    slow = narrow.Generate(asked, timeout=180)
    first = next(slow)
    until(lambda: stats(exact).tokens_generated - generated == 256 * 200, 90, "all is computed")
    for _ in range(3):
        begin = time.monotonic()
        assert len(one(exact, ids([6]), sampling={"max_tokens": 4, "ignore_eos": True}).token_ids) == 4
        assert time.monotonic() - begin < 2
    assert memory().rss - before < 200 << 20
    rollouts = [*first.rollouts, *[rollout for message in slow for rollout in message.rollouts]]
    assert len(rollouts) == 256  # nothing was lost
    assert {len(rollout.token_ids) for rollout in rollouts} == {200}


def test_a_slow_reader_of_deltas_gets_larger_ones(exact: Service, narrow: InferenceServiceStub) -> None:
    """vLLM puts deltas together that nobody took. They are the same tokens, with the same logprobs."""
    fields: dict[str, Any] = {"sampling": LONG | {"top_logprobs": 20, "seed": 9}}
    prompts = [ids([5], 32), ids([6], 32)]
    whole = generate(exact, *prompts, **fields)
    idle(exact)
    before = stats(exact).tokens_generated
    slow = narrow.Generate(request(*prompts, output_mode=DELTAS, **fields), timeout=180)
    pieces = list(next(slow).rollouts)
    until(lambda: stats(exact).tokens_generated - before == 64 * 200, 90, "all is computed")
    for message in slow:
        assert message.ByteSize() <= 65536
        pieces.extend(message.rollouts)
    assert max(len(piece.token_ids) for piece in pieces) > 20
    together = joined(pieces)
    assert together.keys() == whole.keys()
    for place, rollout in whole.items():
        slowly = together[place]
        assert slowly.token_ids == rollout.token_ids
        assert spans(slowly) == spans(rollout)
        assert list(slowly.logprobs) == pytest.approx(list(rollout.logprobs), abs=1e-4)
        rows, wanted = slowly.top_logprobs, rollout.top_logprobs
        assert list(rows.logprobs) == pytest.approx(list(wanted.logprobs), abs=1e-4)
        # Two tokens may be closer than the noise, and change places.
        assert sum(a != b for a, b in zip(rows.token_ids, wanted.token_ids, strict=True)) < 20


@pytest.mark.parametrize("mode", [DELTAS, pb.OUTPUT_MODE_FINISHED])
def test_a_caller_that_leaves_takes_its_rollouts_along(exact: Service, mode: pb.OutputMode.ValueType) -> None:
    before = stats(exact).rollouts_finished
    call = exact.inference.Generate(request(ids([5], 200), sampling=LONG, output_mode=mode), timeout=60)
    until(lambda: stats(exact).num_running, 10, "rollouts run")
    call.cancel()
    idle(exact, seconds=10)
    assert stats(exact).rollouts_finished - before < 200


def test_a_deadline_takes_its_rollouts_along(exact: Service) -> None:
    before = stats(exact).rollouts_finished
    error = refused(lambda: exact.inference.Generate(request(ids([5], 600), sampling=LONG), timeout=0.5))
    assert isinstance(error, DeadlineExceeded)
    idle(exact, seconds=10)
    assert stats(exact).rollouts_finished - before < 600


def test_a_lost_connection_takes_its_rollouts_along(exact: Service) -> None:
    before = stats(exact).rollouts_finished
    channel = connect(exact.address)
    call = InferenceServiceStub(channel).Generate(request(ids([5], 200), sampling=LONG), timeout=60)
    until(lambda: stats(exact).num_running, 10, "rollouts run")
    channel.close()
    idle(exact, seconds=10)
    assert stats(exact).rollouts_finished - before < 200
    assert call.cancelled() or call.code() != grpc.StatusCode.OK


def test_callers_that_leave_at_any_moment_leave_nothing(exact: Service) -> None:
    """Among the moments are those in which requests are on their way into the engine. It is paused, so that none
    can end by itself."""
    idle(exact)
    before = stats(exact)
    pause(exact)
    try:
        for i in range(60):
            prompts = [ids([5], 8), ids([6], 8)] if i % 2 else [ids(list(range(3, 103)), 16)]
            call = exact.inference.Generate(request(*prompts, sampling=LONG), timeout=60)
            scored = pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5] * 250)] * 20)
            scores = exact.inference.Score(scored, timeout=60)
            time.sleep(i * 0.0003)
            call.cancel()
            scores.cancel()
        until(lambda: stats(exact).num_waiting == 0, 10, "nothing waits")
    finally:
        resume(exact)
    assert len(one(exact, ids([5]), sampling={"max_tokens": 3, "ignore_eos": True}).token_ids) == 3
    after = stats(exact)  # of a step of the engine's after all that
    assert after.kv_cache_usage == 0
    assert after.tokens_generated - before.tokens_generated == 3
    assert after.rollouts_finished - before.rollouts_finished == 1
