"""A trainer whose updates by NCCL bring what changed alone: fixtures, and what their tests do to a policy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import host_nccl
from tests.host_nccl import wide
from tests.over_nccl import Make, client, holds, serving, trainers
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer import messages
from weight_transfer.sparse import bits

__all__ = ["client", "memory", "service", "trainer"]  # fixtures
#: How much memory the messages of an update have, on either side: each its own, or that of three before it.
MEMORY = {"apart": messages.ALL_BYTES, "again": 0}


def _on_a_gpu_with(memory: int, *arguments: Any) -> Any:
    messages.ALL_BYTES = memory  # in the service's process
    return host_nccl.on_a_gpu(*arguments)


@pytest.fixture(params=MEMORY)
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(messages, "ALL_BYTES", MEMORY[request.param])
    return MEMORY[request.param]


@pytest.fixture
def service(tmp_path: Path, memory: int) -> Iterator[WeightService]:
    with serving(tmp_path, wide, partial(_on_a_gpu_with, memory)) as service:
        yield service


@pytest.fixture
def trainer(client: InferenceClient) -> Iterator[Make]:
    with trainers(client, lambda dtype: wide().to(dtype), sparse=True) as make:
        yield make


def change(model: nn.Module, share: float, seed: int) -> int:
    """Other bits in that share of the elements, anywhere. Returns how many elements those are."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for parameter in model.parameters():
        flat = bits(parameter)
        where = (torch.rand(flat.shape, generator=generator) < share).nonzero().view(-1)
        flat[where] ^= torch.randint(1, 1 << 15, where.shape, generator=generator).to(flat.dtype)
        count += len(where)
    return count


def assert_changes_travel_alone(
    client: InferenceClient, weights: PolicyWeights, model: nn.Module, seed: int
) -> None:
    """The next update brings what changes, and nothing else."""
    count = change(model, 0.01, seed)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
