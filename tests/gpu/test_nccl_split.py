"""An engine on two GPUs takes the weights of a trainer on a third, by NCCL."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.errors import TandemError
from tandem.weights.v1 import weights_pb2
from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import assert_agrees, digest, digest_of
from tests.gpu.test_nccl import MODES, state, until
from tests.services import Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.updates import retryable
from trainer_service.weights import PolicyWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices"),
]
DEVICE = "cuda:2"


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    engine = ENGINE | {"tensor_parallel_size": 2}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(
            checkpoint, Path(folder), wait=False, environment=on_devices(0, 1), **engine
        ) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.fixture
def policy(service: Service, checkpoint: Path) -> Iterator[Any]:
    made: list[PolicyWeights] = []
    with closing(InferenceClient(service.address)) as client:

        def make(dtype: torch.dtype, mode: str) -> tuple[Any, PolicyWeights]:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(DEVICE)
            made.append(PolicyWeights(client, lambda: model, transport="nccl", mode=mode, timeout_s=60))
            return model, made[-1]

        yield make
        for weights in made:
            weights.detach()
        service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)


def change(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["mirror", "buckets"])
def test_each_update_is_the_trainers_to_the_bit(
    service: Service, policy: Any, dtype: torch.dtype, mode: str
) -> None:
    model, weights = policy(dtype, mode)
    for _ in range(5):
        change(model)
        weights.sync()
        assert (weights.transport, weights.aliased) == ("nccl", False)
        assert digest(service) == (weights.weight_version, digest_of(model, service))
    assert weights.bytes_moved == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert_agrees(service, model.to("cuda:0"))


@MODES
def test_a_worker_that_stands_still_is_given_up_and_comes_back(
    service: Service, policy: Any, mode: str
) -> None:
    model, weights = policy(torch.bfloat16, mode)
    weights.sync()
    workers = [p for p in service.children() if b"Worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(workers) == 2
    change(model)
    os.kill(workers[1], signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(TandemError) as lost:
            weights._sync()
        assert retryable(lost.value)
        assert time.monotonic() - began < 5
    finally:
        os.kill(workers[1], signal.SIGCONT)
    until(lambda: state(service).state != weights_pb2.WEIGHT_STATE_WRITING, 5)
    weights.sync()
    service.wait_until("SERVING", 10)
    assert digest(service)[1] == digest_of(model, service)
