"""Updates of an engine that quantizes its weights as it loads them, on a device, with its graphs on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tandem.inference.v1 import inference_pb2 as pb
from tests import models
from tests.faults import oracle, raw
from tests.gpu.engines import GRAPHS
from tests.gpu.test_colocate import digest
from tests.services import Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Largest difference of two logprobs of one policy, where kernels add up in another order.
SAME = 0.05
PROMPT = oracle.PROMPTS[2]


@pytest.fixture(scope="module", params=["fp8_per_tensor", "fp8_per_channel"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Path]]:
    checkpoint = models.make(tmp_path_factory.mktemp("quantized"), "qwen2")
    engine = GRAPHS | {"quantization": request.param, "enable_sleep_mode": "true"}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(checkpoint, Path(folder), wait=False, **engine) as service:
            service.wait_until("SERVING", 240)
            yield service, checkpoint


def scores(service: Service) -> torch.Tensor:
    """Of one sequence, which is computed at once and without a graph."""
    return oracle.scores(service, [PROMPT])[0]


def assert_graphs_agree(service: Service) -> None:
    """What was sampled in graphs has the logprobs that it has without them."""
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=PROMPT))],
        sampling=pb.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True),
    )
    rollouts = [r for message in service.inference.Generate(request, timeout=120) for r in message.rollouts]
    tokens, logprobs = list(rollouts[0].token_ids), torch.tensor(rollouts[0].logprobs)
    found = oracle.scores(service, [PROMPT + tokens])[0][-len(tokens) :]
    assert len(tokens) == 16
    assert float((found - logprobs).abs().max()) < oracle.NOISE


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_an_update_is_quantized_as_the_checkpoint_was(made: tuple[Service, Path], transport: str) -> None:
    """And back to the checkpoint's weights, to the scores of the engine as it was loaded."""
    service, checkpoint = made
    original, other = oracle.model_of(checkpoint), oracle.model_of(checkpoint)
    oracle.perturb(other, 1)
    model = oracle.model_of(checkpoint).cuda()
    loaded, held, found = scores(service), digest(service)[1], []
    assert_graphs_agree(service)
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport=transport)
        weights.sync()
        assert weights.aliased == (transport == "shared")
        for _ in range(2):
            for policy in (other, original):
                with weights.update():
                    oracle.become(model, policy)
                weights.sync()
                assert_graphs_agree(service)
                found.append(scores(service))
            assert digest(service)[1] == held
        weights.detach()
    raw.restore(service.weights)
    found.append(scores(service))
    for again in (found[1], found[3], found[4]):
        assert float((again - loaded).abs().max()) < SAME
    assert float((found[0] - found[2]).abs().max()) < SAME
    assert float((found[0] - loaded).abs().max()) > oracle.OTHER


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_what_is_written_while_it_sleeps_is_quantized_as_it_wakes(
    made: tuple[Service, Path], transport: str
) -> None:
    service, checkpoint = made
    model, other = oracle.model_of(checkpoint).cuda(), oracle.model_of(checkpoint)
    oracle.perturb(other, 1)
    loaded, found = scores(service), []
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport=transport)
        weights.sync()
        with weights.update():
            oracle.become(model, other)
        weights.sync()
        found.append(scores(service))
        weights.detach()
        raw.restore(service.weights)
        client.sleep()
        weights.sync()
        client.wake_up()
        assert_graphs_agree(service)
        found.append(scores(service))
        client.sleep()
        raw.restore(service.weights)
        client.wake_up()
        found.append(scores(service))
        weights.detach()
    assert float((found[1] - found[0]).abs().max()) < SAME
    assert float((found[2] - loaded).abs().max()) < SAME
    assert float((found[0] - loaded).abs().max()) > oracle.OTHER
