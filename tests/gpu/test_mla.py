"""Updates of an engine with latent attention (MLA) on a device, whose captured graphs know the memory of what they
compute with.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.faults import checkpoints, oracle
from tests.gpu.engines import GRAPHS
from tests.gpu.test_colocate import digest
from tests.services import Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    checkpoint = checkpoints.make(tmp_path_factory.mktemp("mla"), "deepseek_v2")
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(checkpoint, Path(folder), wait=False, **GRAPHS) as service:
            service.wait_until("SERVING", 300)
            yield service, checkpoint


def sampled_far_from(service: Service, model: torch.nn.Module) -> float:
    """By how much the logprobs of sampled tokens differ from the model's."""
    rollouts = oracle.Rollouts(service, max_tokens=24)
    rollouts.join()
    assert rollouts.error is None
    expected = [
        oracle.logprobs(model, [*prompt, *tokens])[len(prompt) - 1 :]
        for prompt, tokens in zip(oracle.PROMPTS, rollouts.tokens, strict=True)
    ]
    return oracle.difference([torch.tensor(found) for found in rollouts.logprobs], expected)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_updates_reach_prompts_and_what_is_sampled(made: tuple[Service, Path], transport: str) -> None:
    service, checkpoint = made
    model = oracle.model_of(checkpoint).cuda()
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport=transport)
        weights.sync()
        for seed in (1, 2):
            before = oracle.scores(service), digest(service)[1]
            other = copy.deepcopy(model).cpu()
            oracle.perturb(other, seed)
            with weights.update():
                oracle.become(model, other)
            weights.sync()
            assert oracle.far_from(service, other) < oracle.NOISE
            assert sampled_far_from(service, other) < oracle.NOISE
            assert oracle.difference(before[0], oracle.scores(service)) > oracle.OTHER
            assert digest(service)[1] != before[1]
        weights.detach()
