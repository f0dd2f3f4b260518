"""Updates of an engine with experts on a device, whatever form vLLM computes with them in."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.faults import checkpoints, oracle
from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import digest
from tests.services import Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Largest difference of two logprobs that a device's float32 arithmetic makes.
NEAR = 0.05
#: Triton multiplies float32 in TF32 otherwise, which has three bits more than bfloat16.
IN_FULL = {"TRITON_F32_DEFAULT": "ieee"}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Path]]:
    checkpoint = checkpoints.make(tmp_path_factory.mktemp(request.param), request.param, torch.float32)
    engine = ENGINE | {"dtype": "float32"}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(
            checkpoint, Path(folder), wait=False, environment=IN_FULL, **engine
        ) as service:
            service.wait_until("SERVING", 240)
            yield service, checkpoint


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_updates_reach_the_experts(made: tuple[Service, Path], transport: str) -> None:
    service, checkpoint = made
    model = oracle.model_of(checkpoint, torch.float32).cuda()
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
            assert oracle.far_from(service, other, torch.float32) < NEAR
            assert oracle.difference(before[0], oracle.scores(service)) > oracle.OTHER
            assert digest(service)[1] != before[1]
        weights.detach()
