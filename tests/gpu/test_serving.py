"""The inference service on a CUDA device."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.engine.v1 import engine_pb2
from tandem.errors import TandemError
from tandem.inference.v1 import inference_pb2 as pb
from tandem.rpc import translate
from tests.gpu.engines import ENGINE
from tests.services import Service, inference_service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 6, 7, 8], [40, 41, 42], [200, 100, 50, 25, 12]]


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(checkpoint, Path(folder), wait=False, **ENGINE) as service:
            service.wait_until("SERVING", 240)
            yield service


def _generate(service: Service, **fields: object) -> list[pb.Rollout]:
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=ids)) for ids in PROMPTS],
        sampling=pb.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True),
        **fields,
    )
    rollouts = [r for message in service.inference.Generate(request, timeout=120) for r in message.rollouts]
    return sorted(rollouts, key=lambda r: r.prompt_index)


def _refused(call: object, request: object) -> TandemError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=60)  # type: ignore[operator]
    return translate(caught.value)


def test_logprobs_agree_with_transformers(service: Service, checkpoint: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).cuda()
    for ids, rollout in zip(PROMPTS, _generate(service), strict=True):
        whole = torch.tensor([ids + list(rollout.token_ids)], device="cuda")
        with torch.no_grad():
            logprobs = policy(whole).logits[0].float().log_softmax(-1)
        mine = [logprobs[i - 1, whole[0, i]].item() for i in range(len(ids), whole.shape[1])]
        # bf16 keeps 8 bits: logits of about 10 are exact to 0.04.
        assert mine == pytest.approx(list(rollout.logprobs), abs=0.15)
        assert [(span.weight_version, span.num_tokens) for span in rollout.version_spans] == [(1, 16)]


def test_deltas_add_up_to_the_finished_rollouts(service: Service) -> None:
    whole = _generate(service)
    pieces = _generate(service, output_mode=pb.OUTPUT_MODE_DELTAS)
    for i, rollout in enumerate(whole):
        mine = [piece for piece in pieces if piece.prompt_index == i]
        assert [t for piece in mine for t in piece.token_ids] == list(rollout.token_ids)
        assert [p for piece in mine for p in piece.logprobs] == pytest.approx(
            list(rollout.logprobs), abs=1e-4
        )


def test_score_agrees_with_generate(service: Service) -> None:
    rollouts = _generate(service)
    sequences = [pb.TokenIds(ids=ids + list(r.token_ids)) for ids, r in zip(PROMPTS, rollouts, strict=True)]
    answer = service.inference.Score(pb.ScoreRequest(sequences=sequences), timeout=120)
    for score in (score for message in answer for score in message.scores):
        mine = rollouts[score.sequence_index].logprobs
        assert list(score.logprobs)[-len(mine) :] == pytest.approx(list(mine), abs=0.15)


def test_what_arrives_while_paused_waits(service: Service) -> None:
    service.engine.Pause(engine_pb2.PauseRequest(), timeout=30)
    request = pb.GenerateRequest(prompts=[pb.Prompt(text="hello")])
    with pytest.raises(grpc.RpcError) as caught:
        list(service.inference.Generate(request, timeout=1))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    service.engine.Resume(engine_pb2.ResumeRequest(), timeout=30)
    assert len(list(service.inference.Generate(request, timeout=30))) >= 1


def test_a_killed_engine_is_noticed(service: Service) -> None:
    (engine,) = [p for p in service.children() if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(engine, signal.SIGKILL)
    started = time.monotonic()
    service.wait_until("NOT_SERVING", 10)
    assert time.monotonic() - started < 5
