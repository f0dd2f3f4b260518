"""Calls of the inference service, as its tests make them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from tandem.engine.v1 import engine_pb2
from tandem.errors import TandemError
from tandem.inference.v1 import inference_pb2 as pb
from tandem.rpc import translate
from tests.services import Service

Rollouts = dict[tuple[int, int], pb.Rollout]

LONG = dict(ignore_eos=True, max_tokens=200)


def ids(tokens: Sequence[int], n: int | None = None) -> pb.Prompt:
    """A prompt of token ids."""
    return pb.Prompt(token_ids=pb.TokenIds(ids=tokens), n=n)


def request(*prompts: pb.Prompt, sampling: dict[str, Any] | None = None, **fields: Any) -> pb.GenerateRequest:
    """A request of Generate."""
    return pb.GenerateRequest(prompts=prompts, sampling=pb.SamplingParams(**(sampling or {})), **fields)


def generate(service: Service, *prompts: pb.Prompt, **fields: Any) -> Rollouts:
    """Run a request in FINISHED mode: each rollout, by its prompt's index and its own."""
    done: Rollouts = {}
    for message in service.inference.Generate(request(*prompts, **fields), timeout=60):
        for rollout in message.rollouts:
            place = rollout.prompt_index, rollout.rollout_index
            assert place not in done, f"rollout {place} came twice"
            done[place] = rollout
    return done


def one(service: Service, prompt: pb.Prompt, **fields: Any) -> pb.Rollout:
    """The only rollout of the only prompt."""
    (rollout,) = generate(service, prompt, **fields).values()
    return rollout


def score(service: Service, *sequences: Sequence[int], **fields: Any) -> list[pb.SequenceScore]:
    """Scores in the order of the sequences."""
    asked = pb.ScoreRequest(sequences=[pb.TokenIds(ids=tokens) for tokens in sequences], **fields)
    done = {s.sequence_index: s for m in service.inference.Score(asked, timeout=60) for s in m.scores}
    return [done[index] for index in range(len(sequences))]


def stats(service: Service) -> engine_pb2.GetStatsResponse:
    """GetStats."""
    return service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=5)


def pause(service: Service, mode: str = "KEEP", seconds: float = 30, **fields: Any) -> None:
    """Pause."""
    value = engine_pb2.PauseMode.Value(f"PAUSE_MODE_{mode}")
    service.engine.Pause(engine_pb2.PauseRequest(mode=value, **fields), timeout=seconds)


def resume(service: Service) -> None:
    """Resume."""
    service.engine.Resume(engine_pb2.ResumeRequest(), timeout=30)


def refused(call: Callable[[], Any]) -> TandemError:
    """The error of a call that must fail."""
    try:
        answer = call()
        if isinstance(answer, Iterator):
            for _ in answer:
                pass
    except grpc.RpcError as error:
        return translate(error)
    raise AssertionError(f"the call did not fail: {answer}")


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition` is true; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return value


def idle(service: Service, seconds: float = 5) -> None:
    """Wait until the engine computes nothing and holds nothing."""

    def nothing() -> bool:
        now = stats(service)
        return not now.num_running and not now.num_waiting and not now.kv_cache_usage

    until(nothing, seconds, "the engine is idle")


class Reading:
    """A Generate call that a thread reads: `pieces` are what arrived so far, `error` what ended it."""

    def __init__(self, service: Service, asked: pb.GenerateRequest, seconds: float = 60) -> None:
        self.call = service.inference.Generate(asked, timeout=seconds)
        self.pieces: list[pb.Rollout] = []
        self.error: TandemError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                self.pieces.extend(message.rollouts)
        except grpc.RpcError as error:
            self.error = translate(error)

    @property
    def num_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(len(piece.token_ids) for piece in self.pieces)

    @property
    def running(self) -> bool:
        """Whether the call has not ended."""
        return self._thread.is_alive()

    def end(self, seconds: float = 60) -> list[pb.Rollout]:
        """Wait for the call's end; all its pieces."""
        self._thread.join(seconds)
        assert not self.running, f"the call has not ended after {seconds} s"
        return self.pieces


def joined(pieces: Sequence[pb.Rollout]) -> Rollouts:
    """The rollouts that deltas make up, spans of one version in a row made one."""
    whole: Rollouts = {}
    for piece in pieces:
        place = piece.prompt_index, piece.rollout_index
        if place not in whole:
            whole[place] = pb.Rollout()
            whole[place].CopyFrom(piece)
            continue
        rollout, text = whole[place], whole[place].text
        assert not rollout.finish_reason, f"rollout {place} goes on after its end"
        spans = [*rollout.version_spans, *piece.version_spans]
        rollout.MergeFrom(piece)
        rollout.text = text + piece.text
        del rollout.version_spans[:]
        for span in spans:
            if rollout.version_spans and rollout.version_spans[-1].weight_version == span.weight_version:
                rollout.version_spans[-1].num_tokens += span.num_tokens
            else:
                rollout.version_spans.append(span)
    return whole


def spans(rollout: pb.Rollout) -> list[tuple[int, int]]:
    """(version, tokens) of a rollout's spans."""
    return [(span.weight_version, span.num_tokens) for span in rollout.version_spans]
