"""What faults are tried on: a service, which they leave as they found it, and several that are the test's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.faults import raw
from tests.faults.plane import Plane
from tests.fleets import Fleet, Replicated
from tests.services import Service
from trainer_service.client import InferenceClient
from trainer_service.replicated import ReplicatedWeights


@pytest.fixture(scope="module")
def made(llama: Service, checkpoints: dict[str, Path]) -> Plane:
    return Plane(llama, checkpoints["llama"])


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It is left with the checkpoint, committed, without a session."""
    made.start()
    yield made
    made.wait_until_alone()
    if raw.now(made.stub).weight_version != made.version or raw.state(made.stub) == "TORN":
        raw.restore(made.stub)
    made.start()
    made.assert_unchanged()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """They serve."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        fleet = Fleet(folder)
        yield fleet
        fleet.stop()


@pytest.fixture
def replicated(fleet: Fleet) -> Iterator[Replicated]:
    """Makes the weights of a model. Their sessions are ended."""
    made: list[ReplicatedWeights] = []
    clients = [InferenceClient(address) for address in fleet.addresses]

    def make(model: nn.Module, timeout_s: float = 60.0, **how: Any) -> ReplicatedWeights:
        made.append(ReplicatedWeights(clients, lambda: model, timeout_s=timeout_s, **how))
        return made[-1]

    yield make
    for weights in made:
        weights.detach()
    for client in clients:
        client.close()
