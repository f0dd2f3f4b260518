"""Rollouts are put into messages of bounded size."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.host import Host
from inference_service.servicers.inference import InferenceServicer, _fitting
from tandem.errors import Reason, ResourceExhausted
from tandem.inference.v1 import inference_pb2 as pb

LIMIT = 1 << 16


@given(st.lists(st.integers(0, LIMIT - 100), max_size=40), st.sampled_from([LIMIT, 1 << 24]))
def test_messages_are_under_the_limit_and_lose_nothing(sizes: list[int], limit: int) -> None:
    parts = [pb.Rollout(prompt_index=index, text="x" * size) for index, size in enumerate(sizes)]
    messages = [pb.GenerateResponse(rollouts=m) for m in InferenceServicer(Host(), limit)._messages(parts)]
    assert [rollout for message in messages for rollout in message.rollouts] == parts
    for message, following in pairwise(messages):
        assert (
            message.ByteSize() + following.rollouts[0].ByteSize() > LIMIT // 2
        )  # no more messages than needed
    assert all(message.ByteSize() <= min(limit, 1 << 20) for message in messages)
    assert all(message.rollouts for message in messages)


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ResourceExhausted) as raised:
        list(InferenceServicer(Host(), LIMIT)._messages([pb.Rollout(text="x" * LIMIT)]))
    assert raised.value.reason == Reason.MESSAGE_TOO_LARGE


@given(st.integers(0, 60), st.integers(0, 3), st.integers(120, 4000), st.integers(0, 60))
def test_a_delta_too_large_is_cut_and_says_the_same(tokens: int, k: int, limit: int, cut: int) -> None:
    spans = [(1, min(cut, tokens)), (2, tokens - min(cut, tokens))]
    delta = pb.Rollout(
        prompt_index=3,
        rollout_index=4,
        token_ids=range(1000, 1000 + tokens),
        logprobs=[-float(i) for i in range(tokens)],
        version_spans=[pb.VersionSpan(weight_version=v, num_tokens=n) for v, n in spans if n],
        text="text",
        prompt_token_ids=[7, 8],
        finish_reason=pb.FINISH_REASON_STOP,
        stop_token_id=5,
    )
    if k:
        delta.top_logprobs.k = k
        delta.top_logprobs.token_ids.extend(range(tokens * k))
        delta.top_logprobs.logprobs.extend([-1.0] * (tokens * k))
    pieces = list(_fitting(delta, limit))
    assert all(piece.ByteSize() + 16 <= limit or len(piece.token_ids) < 2 for piece in pieces)
    assert all(piece.prompt_index == 3 and piece.rollout_index == 4 for piece in pieces)
    assert [p.finish_reason for p in pieces] == [0] * (len(pieces) - 1) + [pb.FINISH_REASON_STOP]
    whole = pb.Rollout()
    for piece in pieces:
        assert sum(span.num_tokens for span in piece.version_spans) == len(piece.token_ids)
        whole.token_ids.extend(piece.token_ids)
        whole.logprobs.extend(piece.logprobs)
        whole.top_logprobs.token_ids.extend(piece.top_logprobs.token_ids)
        whole.top_logprobs.logprobs.extend(piece.top_logprobs.logprobs)
        whole.prompt_token_ids.extend(piece.prompt_token_ids)
        whole.text += piece.text
    versions = [s.weight_version for p in pieces for s in p.version_spans for _ in range(s.num_tokens)]
    assert versions == [1] * spans[0][1] + [2] * spans[1][1]
    for name in ("token_ids", "logprobs", "prompt_token_ids", "text"):
        assert getattr(whole, name) == getattr(delta, name)
    assert whole.top_logprobs.token_ids == delta.top_logprobs.token_ids
