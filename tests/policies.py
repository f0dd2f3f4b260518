"""A weight service without an engine, and the trainer's end of it: fixtures and what their tests ask of both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.weights.v1 import weights_pb2 as pb
from tests.weight_service import WeightService, network
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensors

LEASE_S = 1.2
#: Aliased, written, streamed.
WAYS = [("shared", torch.bfloat16), ("shared", torch.float32), ("stream", torch.bfloat16)]


@pytest.fixture
def service() -> Iterator[WeightService]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        service = WeightService(f"unix://{folder}/s", LEASE_S)
        service.start()
        yield service
        service.kill()


@pytest.fixture
def engine(service: WeightService) -> Iterator[Engine]:
    engine = Engine(service.address)
    engine.wait_until_serving(30)
    yield engine
    engine.close()


class Engine(InferenceClient):
    """What the service says of its engine."""

    @property
    def version(self) -> int:
        return self._now().weight_version

    @property
    def state(self) -> str:
        """COMMITTED, WRITING, TORN, …"""
        return pb.WeightState.Name(self._now().state).removeprefix("WEIGHT_STATE_")

    @property
    def paused(self) -> bool:
        return self.get_model().state == ServingState.SERVING_STATE_PAUSED

    @property
    def digest(self) -> int:
        """Of what is in the engine's memory now."""
        return self._now(include_digest=True).digest

    def _now(self, **fields: bool) -> pb.GetWeightVersionResponse:
        return self.weights.GetWeightVersion(pb.GetWeightVersionRequest(**fields), timeout=5)


Policy = Callable[..., PolicyWeights]


@pytest.fixture
def policy(service: WeightService, engine: Engine) -> Iterator[Policy]:
    """Makes the weights of a model. Their sessions are ended."""
    client = InferenceClient(service.address)
    made: list[PolicyWeights] = []

    def make(
        model: nn.Module, transport: str | Sequence[str] = "shared", timeout_s: float = 10.0, **how: Any
    ) -> PolicyWeights:
        made.append(PolicyWeights(client, lambda: model, transport=transport, timeout_s=timeout_s, **how))
        return made[-1]

    yield make
    for weights in made:
        weights.detach()
    client.close()


class Sgd(torch.optim.SGD):
    """SGD that also does what the test wants in the middle of its step."""

    def __init__(self, model: nn.Module, during: Callable[[], None] = lambda: None) -> None:
        super().__init__(model.parameters(), lr=0.5)
        self.during = during

    def step(self, closure: None = None) -> None:
        super().step(closure)
        self.during()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def digest_of(model: nn.Module) -> int:
    values = [value.detach().to(torch.bfloat16) for _, value in sorted(model.named_parameters())]
    return combine(digest_tensors(values))


def assert_same(engine: Engine, model: nn.Module) -> None:
    """The engine holds the model's bits, committed, and serves."""
    assert (engine.state, engine.paused) == ("COMMITTED", False)
    assert engine.digest == digest_of(model)


def restore(engine: Engine) -> None:
    engine.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=5)


#: Digest of the service's checkpoint.
ZEROS = combine(
    digest_tensors([torch.zeros_like(value) for _, value in sorted(network().named_parameters())])
)


def in_engine(engine: Engine, model: nn.Module) -> bool:
    """Whether a write to the model is a write to the engine. The model is as before."""
    before, first = engine.digest, next(model.parameters())
    value = first.detach().clone()
    with torch.no_grad():
        first += 8
    changed = engine.digest != before
    with torch.no_grad():
        first.copy_(value)
    return changed
