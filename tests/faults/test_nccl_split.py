"""Updates by NCCL to an engine of two workers, without a GPU: a communicator of three, and each takes its parts.

tests/gpu/test_nccl.py has the same promises on three GPUs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tandem.errors import DataLoss, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import host_nccl
from tests.forks import processes
from tests.host_nccl import write
from tests.over_nccl import (
    BUSY,
    DTYPES,
    LEASE_S,
    MODES,
    Make,
    client,
    holds,
    now,
    serving,
    trainers,
    until_under_way,
)
from tests.split_nccl import on_two_gpus, split
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient
from weight_transfer.transports.nccl import NcclTransport

__all__ = ["client"]  # a fixture


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Split by rows, split by columns, and vectors that both workers have."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 8)).to(dtype)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[WeightService]:
    with serving(tmp_path, network, on_two_gpus) as service:
        yield service


@pytest.fixture
def trainer(client: InferenceClient) -> Iterator[Make]:
    with trainers(client, network) as make:
        yield make


def test_nobody_has_a_whole_matrix() -> None:
    _, mine = split(network())
    parts = {p.spec.name: [p.blocks[0].shape, q.blocks[0].shape] for p, q in zip(*mine, strict=True)}
    assert parts["0.weight"] == [(8, 8)] * 2, "of (16, 8)"
    assert parts["1.weight"] == [(8, 8)] * 2, "of (8, 16)"
    assert parts["0.bias"] == [(16,)] * 2


@MODES
@DTYPES
def test_each_update_is_the_trainers_to_the_bit(
    client: InferenceClient, trainer: Any, mode: str, dtype: torch.dtype
) -> None:
    model, weights = trainer(mode, dtype)
    for seed in range(4):
        write(model, seed)
        weights.sync()
        assert (weights.transport, weights.aliased) == ("nccl", False)
        assert weights.bytes_moved == 2 * sum(parameter.numel() for parameter in model.parameters())
        assert holds(client, weights), "of all that the workers hold"
    transport = weights._session.transport
    assert isinstance(transport, NcclTransport)
    assert transport._ranks == 3
    assert len(transport.layout.cut) > 3, "buckets are used again"


@MODES
def test_bytes_that_change_on_the_way_are_noticed(client: InferenceClient, trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    before = now(client, digest=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            host_nccl,
            "carried",
            lambda window, memory: memoryview(bytes([memory[0] ^ 1]) + bytes(memory[1:])),
        )
        write(model, 1)
        with pytest.raises(DataLoss) as lost:
            weights.sync()
    assert lost.value.reason == Reason.DIGEST_MISMATCH
    if mode == "staged":
        assert now(client, digest=True).digest == before.digest
    else:
        assert now(client).state == pb.WEIGHT_STATE_TORN
    weights.sync()
    assert holds(client, weights)


@MODES
def test_bytes_that_change_on_the_way_to_one_worker_alone(
    client: InferenceClient, trainer: Any, mode: str
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_nccl, "carried_to", _spoilt_for_the_second)
        write(model, 1)
        with pytest.raises(DataLoss, match="do not agree") as lost:
            weights.sync()
    assert lost.value.reason == Reason.DIGEST_MISMATCH
    weights.sync()
    assert holds(client, weights)


def _spoilt_for_the_second(worker: int, memory: memoryview) -> memoryview:
    return memoryview(bytes([memory[0] ^ 1]) + bytes(memory[1:])) if worker else memory


@MODES
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("where", ["joining", "before any byte", "commit sent"])
def test_a_trainer_that_goes_away_leaves_the_old_version_or_nothing(
    service: WeightService, client: InferenceClient, trainer: Any, mode: str, kind: signal.Signals, where: str
) -> None:
    here, there = processes.Pipe()
    arguments = (service.address, mode, where, there, network)
    dying = processes.Process(target=host_nccl.dying_trainer, args=arguments)
    dying.start()
    assert dying.pid is not None
    try:
        assert here.poll(30)
        assert here.recv() == where
        if where != "joining":
            until_under_way(client)
        os.kill(dying.pid, kind)
        began = time.monotonic()
        while now(client).state in BUSY:
            assert time.monotonic() - began < LEASE_S + 5
            time.sleep(0.02)
        torn = mode == "in_place" and where != "joining"
        after = now(client)
        assert after.weight_version == 2
        assert after.state == (pb.WEIGHT_STATE_TORN if torn else pb.WEIGHT_STATE_COMMITTED)
        model, weights = trainer(mode)
        write(model, 9)
        weights.sync()
        assert holds(client, weights)
    finally:
        dying.kill()
        dying.join(10)
