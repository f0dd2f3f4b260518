"""InferenceService."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import structlog

from inference_service.admission import Room
from inference_service.host import Host
from inference_service.rollouts import Piece, Request
from inference_service.servicers import prompts
from inference_service.servicers.engine import SERVING_STATES
from inference_service.servicers.sampling import sampling_params, score_params
from tandem.errors import Reason, ResourceExhausted, invalid
from tandem.inference.v1 import inference_pb2 as pb
from tandem.inference.v1 import inference_pb2_grpc

_FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORTED,
    "repetition": pb.FINISH_REASON_REPETITION,
}
#: Large enough that a message costs little for what it carries, small enough that the first comes soon.
_MESSAGE_BYTES = 1 << 20
#: At most what a part takes in its message beside itself.
_FRAME_BYTES = 16
_MAX_NAME = 256

Part = TypeVar("Part", pb.Rollout, pb.SequenceScore)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serves a Host's policy. No message it sends is larger than `max_message_bytes`."""

    def __init__(
        self,
        host: Host,
        max_message_bytes: int,
        *,
        max_rollouts: int = 1 << 16,
        allow_chat_templates: bool = False,
    ) -> None:
        self._host = host
        self._limit = max_message_bytes
        self._room = Room(max_rollouts)
        self._templates = allow_chat_templates

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        # Who asks what is served wants to know it of a dead engine too.
        policy, (state, reason) = self._host.loaded or self._host.policy, self._host.state()
        info = policy.engine.info
        return pb.GetModelResponse(
            **vars(info),
            state=SERVING_STATES[state],
            reason=reason,
            weight_version=policy.version,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        if not request.prompts:
            raise invalid("prompts", "at least one is required")
        self._room.check(len(request.prompts), "prompts")  # they need none, but take their time
        engine = self._host.policy.engine
        ids = await prompts.token_ids(engine, request.prompts, templates=self._templates)
        return pb.TokenizeResponse(prompts=[pb.TokenIds(ids=one) for one in ids])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        policy = self._host.generating()
        engine = policy.engine
        params = sampling_params(request, engine.info)
        lora = engine.loras.get(request.lora) if request.lora else None
        seed = request.sampling.seed if request.sampling.HasField("seed") else None
        if request.on_commit not in pb.OnCommit.values():
            raise invalid("on_commit", f"no OnCommit {request.on_commit}")
        wait_s = _version_wait(request)
        name = _name(request.request_id)
        # Before anything is made of them: a small message can ask for millions, and be of millions.
        self._room.check(len(request.prompts), "prompts")
        with self._room.take(prompts.num_rollouts(request.prompts), "prompts") as place:
            requests: list[Request] = []
            places: list[tuple[int, int]] = []
            found = await prompts.vllm_prompts(engine, request.prompts, templates=self._templates)
            for i, prompt in enumerate(found):
                asked = request.prompts[i]
                for j in range(asked.n or 1):
                    k = len(requests)
                    own = asked.seed + j if asked.HasField("seed") else None if seed is None else seed + k
                    own = None if own is None else own % 2**63  # vLLM's are signed
                    requests.append(
                        Request(
                            f"{name}-{k}",
                            prompt,
                            params,
                            index=k,
                            lora=lora,
                            seed=own,
                            one_version=request.on_commit == pb.ON_COMMIT_STOP,
                            keeps_cache=request.on_commit == pb.ON_COMMIT_CONTINUE_CACHED,
                        )
                    )
                    places.append((i, j))
            if request.min_weight_version:
                await self._host.at_least(request.min_weight_version, wait_s)
            self._host.generating()  # it may have been torn, or have gone to sleep, since
            async with aclosing(policy.rollouts.run(requests)) as batches:
                async for batch in batches:
                    place.left -= sum(piece.output.finished for piece in batch)
                    rollouts: Iterable[pb.Rollout] = (
                        _rollout(request, piece, *places[piece.index]) for piece in batch
                    )
                    if request.output_mode == pb.OUTPUT_MODE_DELTAS:
                        rollouts = (part for rollout in rollouts for part in _fitting(rollout, self._limit))
                    for message in self._messages(rollouts):
                        yield pb.GenerateResponse(rollouts=message)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> AsyncIterator[pb.ScoreResponse]:
        policy = self._host.generating()
        engine = policy.engine
        params = score_params(request, engine.info)
        lora = engine.loras.get(request.lora) if request.lora else None
        if not request.sequences:
            raise invalid("sequences", "at least one is required")
        wait_s = _version_wait(request)
        name = _name(request.request_id)
        with self._room.take(len(request.sequences), "sequences") as place:
            requests = []
            for i, sequence in enumerate(request.sequences):
                ids = list(sequence.ids)
                if len(ids) < 2:
                    raise invalid(f"sequences[{i}]", "at least two tokens are required")
                prompts.check_ids(engine, ids, f"sequences[{i}]")
                prompt = {"prompt_token_ids": ids}
                requests.append(Request(f"{name}-{i}", prompt, params, index=i, lora=lora))
            if request.min_weight_version:
                await self._host.at_least(request.min_weight_version, wait_s)
            async with aclosing(policy.rollouts.score(requests)) as scores:
                async for index, logprobs, version in scores:
                    place.left -= 1
                    score = pb.SequenceScore(sequence_index=index, weight_version=version)
                    _add_logprobs(score, logprobs, request.top_logprobs, first=1)
                    for message in self._messages([score]):
                        yield pb.ScoreResponse(scores=message)

    def _messages(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        together: list[Part] = []
        size = 0
        for part in parts:
            own = part.ByteSize() + _FRAME_BYTES
            if own > self._limit:
                raise ResourceExhausted(
                    Reason.MESSAGE_TOO_LARGE,
                    f"one rollout or score takes {own} bytes, the limit is {self._limit}",
                )
            if together and size + own > min(_MESSAGE_BYTES, self._limit):
                yield together
                together, size = [], 0
            together.append(part)
            size += own
        if together:
            yield together


def _version_wait(request: pb.GenerateRequest | pb.ScoreRequest) -> float | None:
    """Seconds to wait for the version that is needed; None for as long as the call may last."""
    if not request.HasField("max_version_wait"):
        return None
    seconds = request.max_version_wait.ToNanoseconds() / 1e9
    if seconds < 0:
        raise invalid("max_version_wait", f"must not be negative, is {seconds:g} s")
    return seconds


def _name(request_id: str) -> str:
    """A name for one call's requests. Two calls may bring the same; vLLM's requests must have their own."""
    if len(request_id) > _MAX_NAME:
        raise invalid("request_id", f"must have at most {_MAX_NAME} characters, has {len(request_id)}")
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return f"{request_id or 'request'}-{uuid.uuid4().hex[:8]}"


def _fitting(delta: pb.Rollout, limit: int) -> Iterator[pb.Rollout]:
    """`delta`, cut until its pieces fit: vLLM merges the tokens that wait for a reader that lags."""
    if delta.ByteSize() + _FRAME_BYTES <= limit or len(delta.token_ids) < 2:
        yield delta
        return
    middle, k = len(delta.token_ids) // 2, delta.top_logprobs.k
    first, rest = pb.Rollout(), pb.Rollout()
    rest.CopyFrom(delta)  # with what comes with the last tokens
    first.prompt_index, first.rollout_index = delta.prompt_index, delta.rollout_index
    first.text, rest.text = delta.text, ""
    first.prompt_token_ids[:], rest.prompt_token_ids[:] = delta.prompt_token_ids, []
    for half, cut in ((first, slice(None, middle)), (rest, slice(middle, None))):
        half.token_ids[:] = delta.token_ids[cut]
        half.logprobs[:] = delta.logprobs[cut]
        if k:
            rows = slice(cut.start and cut.start * k, cut.stop and cut.stop * k)
            half.top_logprobs.k = k
            half.top_logprobs.token_ids[:] = delta.top_logprobs.token_ids[rows]
            half.top_logprobs.logprobs[:] = delta.top_logprobs.logprobs[rows]
    del rest.version_spans[:]
    left = middle
    for span in delta.version_spans:
        before = min(span.num_tokens, left)
        for half, count in ((first, before), (rest, span.num_tokens - before)):
            if count:
                half.version_spans.add(weight_version=span.weight_version, num_tokens=count)
        left -= before
    yield from _fitting(first, limit)
    yield from _fitting(rest, limit)


def _rollout(request: pb.GenerateRequest, piece: Piece, prompt_index: int, rollout_index: int) -> pb.Rollout:
    (completion,) = piece.output.outputs
    rollout = pb.Rollout(
        prompt_index=prompt_index,
        rollout_index=rollout_index,
        token_ids=completion.token_ids,
        version_spans=[pb.VersionSpan(weight_version=v, num_tokens=n) for v, n in piece.spans],
        text=completion.text if request.include_text else "",
    )
    # 0.26 repeats all logprobs in a last piece without tokens.
    if completion.logprobs is not None and completion.token_ids:
        _add_logprobs(rollout, completion.logprobs, request.sampling.top_logprobs)
    if piece.first and request.include_prompt_token_ids and rollout_index == 0:
        rollout.prompt_token_ids.extend(piece.output.prompt_token_ids)
    if piece.output.finished:
        stopped = pb.FINISH_REASON_NEW_VERSION if piece.stopped else None
        rollout.finish_reason = stopped or _FINISH[completion.finish_reason]
        rollout.num_cached_prompt_tokens = piece.output.num_cached_tokens or 0
        if isinstance(completion.stop_reason, str):
            rollout.stop_string = completion.stop_reason
        elif completion.stop_reason is not None:
            rollout.stop_token_id = completion.stop_reason
    return rollout


def _add_logprobs(part: pb.Rollout | pb.SequenceScore, flat: Any, k: int, first: int = 0) -> None:
    """Add vLLM's FlatLogprobs. A position's first entry is the token's own; the k most probable follow.

    Where vLLM put two deltas together, a token that is one of the k has a single entry, the first.
    """
    starts, ends = flat.start_indices[first:], flat.end_indices[first:]
    part.logprobs.extend(map(flat.logprobs.__getitem__, starts))
    if not k:
        return
    top = part.top_logprobs
    top.k = k
    for start, end in zip(starts, ends, strict=True):
        if end - start > k:
            top.token_ids.extend(flat.token_ids[start + 1 : start + 1 + k])
            top.logprobs.extend(flat.logprobs[start + 1 : start + 1 + k])
        else:
            row = sorted(range(start, end), key=flat.ranks.__getitem__)
            top.token_ids.extend(map(flat.token_ids.__getitem__, row))
            top.logprobs.extend(map(flat.logprobs.__getitem__, row))
