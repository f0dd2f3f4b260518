"""A trainer and a weight service that NCCL's stand-in connects: what tests of updates by NCCL begin with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tandem import rpc
from tandem.weights.v1 import weights_pb2 as pb
from tests import host_nccl
from tests.weight_service import WeightService, network
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.transports.base import digest_of

LEASE_S = 1.2
#: Of an update that has begun.
BUSY = (pb.WEIGHT_STATE_STAGING, pb.WEIGHT_STATE_WRITING)
MODES = pytest.mark.parametrize("mode", ["in_place", "staged"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["mirror", "buckets"])

Make = Callable[..., tuple[nn.Module, PolicyWeights]]


@contextmanager
def serving(
    folder: Path, model: Callable[[], nn.Module] = network, engine_of: Any = host_nccl.on_a_gpu
) -> Iterator[WeightService]:
    """A service of that model on what stands for a GPU, or several."""
    service = WeightService(f"unix://{folder}/s", LEASE_S, model, engine_of)
    service.start()
    yield service
    service.kill()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[WeightService]:
    """With an engine of one worker."""
    with serving(tmp_path) as service:
        yield service


@pytest.fixture
def client(service: WeightService) -> Iterator[InferenceClient]:
    """Of the `service` that a test has."""
    with closing(InferenceClient(service.address)) as client, host_nccl.instead_of_nccl():
        client.wait_until_serving(20)
        yield client


@contextmanager
def trainers(
    client: InferenceClient, model: Callable[[torch.dtype], nn.Module] = network, **how: Any
) -> Iterator[Make]:
    """Makes policies with their way to the engine. Their sessions are ended."""
    made: list[PolicyWeights] = []

    def make(mode: str = "", dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, PolicyWeights]:
        policy = model(dtype)
        made.append(PolicyWeights(client, lambda: policy, transport="nccl", mode=mode, timeout_s=20, **how))
        return policy, made[-1]

    yield make
    for weights in made:
        weights.detach()


def now(client: InferenceClient, *, digest: bool = False) -> Any:
    with rpc.translated():
        return client.weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=digest), timeout=10)


def until_under_way(client: InferenceClient) -> None:
    """Wait until the service takes an update."""
    end = time.monotonic() + 10
    while now(client).state not in BUSY:
        assert time.monotonic() < end, "no update came"
        time.sleep(0.01)


def holds(client: InferenceClient, weights: PolicyWeights) -> bool:
    """Whether the engine has the trainer's policy, bit for bit, as the version that it was told."""
    session = weights._session
    assert session is not None
    answer = now(client, digest=True)
    assert answer.state == pb.WEIGHT_STATE_COMMITTED
    assert answer.weight_version == weights.weight_version
    return bool(answer.digest == digest_of(session.carried, weights._policy(session.names)))
