"""Updates by NCCL, without a GPU: everything but NCCL itself is real, over gRPC between processes.

tests/gpu/test_nccl.py has the same promises between two GPUs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

from tandem import rpc
from tandem.errors import DataLoss, FailedPrecondition, Reason, TandemError
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
    service,
    trainers,
    until_under_way,
)
from tests.weight_service import WeightService, network
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.weights import PolicyWeights
from weight_transfer.transports import Sum
from weight_transfer.transports.nccl import NcclTransport

__all__ = ["client", "service"]  # fixtures


@pytest.fixture
def trainer(client: InferenceClient) -> Iterator[Make]:
    with trainers(client) as make:
        yield make


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
        assert holds(client, weights)
    assert [update.weight_version for update in weights.history] == [2, 3, 4, 5]


@MODES
def test_an_adapter_goes_merged_and_leaves_the_base_as_it_is(client: InferenceClient, mode: str) -> None:
    """Base and delta are added up in the bucket. The trainer's parameters stay where and what they are."""

    def adapted(dtype: torch.dtype) -> Any:
        return peft.get_peft_model(network(dtype), peft.LoraConfig(r=2, target_modules=["0", "1"]))  # type: ignore[arg-type]

    with trainers(client, adapted) as make:
        model, weights = make(mode)
        base = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters() if "base_layer" in n}
        deltas = [p for n, p in model.named_parameters() if "lora_" in n]
        digests = set()
        for seed in range(3):
            torch.manual_seed(seed)
            for delta in deltas:
                delta.data.normal_()
            weights.sync()
            assert weights.transport == "nccl"
            assert holds(client, weights)
            digests.add(now(client, digest=True).digest)
            assert weights.bytes_moved == 2 * sum(p.numel() for p in network().parameters())
        assert len(digests) == 3
        for name, parameter in model.named_parameters():
            if name in base:
                assert parameter.data_ptr() == base[name][0]
                assert torch.equal(parameter, base[name][1])


def test_one_communicator_serves_all_updates(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    monkeypatch.setattr(host_nccl.nccl, "unique_id", lambda: made.append(host_nccl.unique_id()) or made[-1])
    _, weights = trainer()
    for _ in range(3):
        weights.sync()
    assert len(made) == 1


@MODES
def test_what_stands_goes_ahead_and_the_commit_before_the_last_bytes(trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    order: list[str] = []
    committing, windows = threading.Event(), len(weights._session.transport.layout.cut)
    answer, send = Lease._answer, Lease.send

    def answered(self: Lease, step: str, *more: Any) -> Any:
        found = answer(self, step, *more)
        order.append(f"{step} told")
        return found

    def slow(window: int, memory: memoryview) -> memoryview:
        if (window + 1) % windows == 0:  # the last, which stays on its way for as long as the commit takes
            committing.wait(5)
        order.append("bytes")
        return memory

    def sent(self: Lease, piece: Any) -> None:
        if isinstance(piece, Sum):
            order.append("commit sent")
            committing.set()
        send(self, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "_answer", answered)
        patch.setattr(Lease, "send", sent)
        patch.setattr(host_nccl, "sending", lambda window: order.append("window"))
        patch.setattr(host_nccl, "carried", slow)
        for seed in range(2):
            write(model, seed)
            order.clear()
            committing.clear()
            weights.sync()
            assert order.index("window") < order.index("ready told")
            last = len(order) - 1 - order[::-1].index("bytes")
            assert order.index("commit sent") < last < order.index("committed told")


@MODES
def test_other_parameters_than_stood_are_seen(
    client: InferenceClient, trainer: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all stood at the last update that is looked at once the next has begun."""
    model, weights = trainer(mode)
    for seed in range(3):
        write(model, seed)
        weights.sync()
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    for _ in range(2):
        weights.sync()
        assert holds(client, weights)
    version, whole = weights.weight_version, layer.weight
    layer.weight = nn.Parameter(whole.to(torch.int8), requires_grad=False)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"weight is quantized to torch\.int8"):
            weights.sync()
    answer = now(client)
    assert (answer.state, answer.weight_version) == (pb.WEIGHT_STATE_COMMITTED, version)
    layer.weight = whole
    with caplog.at_level("WARNING"):
        weights.sync()
    assert not caplog.records, "it does not have to be tried twice"
    assert holds(client, weights)


def test_parameters_that_became_the_mirror_are_the_trainers_own_again(trainer: Any) -> None:
    model, weights = trainer()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    weights.sync()
    assert all(parameter.data_ptr() != own[name] for name, parameter in model.named_parameters())
    weights.detach()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_service_chooses_by_what_both_have(client: InferenceClient) -> None:
    weights = PolicyWeights(client, network)
    weights.open()
    assert weights.transport == "nccl"
    weights.detach()
    host_nccl.nccl.version = lambda: 0  # the fixture puts it back
    weights.open()
    assert weights.transport == "stream"
    weights.detach()
    asked = PolicyWeights(client, network, transport="nccl")
    with pytest.raises(FailedPrecondition, match="the trainer has no NCCL") as refused:
        asked.open()
    assert refused.value.reason == Reason.TRANSPORT_UNAVAILABLE
    host_nccl.nccl.version = lambda: 22703
    weights.sync()
    assert weights.transport == "stream"
    with pytest.raises(FailedPrecondition, match=r"trainer's NCCL is 2\.27\.3, and the engine's 2\.28\.0"):
        asked.open()
    weights.detach()


@MODES
def test_bytes_that_change_on_the_way_are_noticed(client: InferenceClient, trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    before = now(client, digest=True)
    as_it_is = host_nccl.carried

    def spoilt(window: int, memory: memoryview) -> memoryview:
        return memoryview(bytes([memory[0] ^ 1]) + bytes(memory[1:]))

    host_nccl.carried = spoilt
    try:
        write(model, 1)
        with pytest.raises(DataLoss) as lost:
            weights.sync()
    finally:
        host_nccl.carried = as_it_is
    assert lost.value.reason == Reason.DIGEST_MISMATCH
    after = now(client)
    assert after.weight_version == before.weight_version
    if mode == "staged":
        assert now(client, digest=True).digest == before.digest
    else:
        assert after.state == pb.WEIGHT_STATE_TORN
    weights.sync()
    assert holds(client, weights)


def test_two_trainers_take_turns(client: InferenceClient, trainer: Any) -> None:
    _, first = trainer()
    first.sync()
    model, second = trainer()
    write(model, 3)
    second.sync()
    assert first._stands(), "what it sends goes ahead"
    with pytest.raises(FailedPrecondition) as taken:
        first.sync()
    assert taken.value.reason == Reason.BASE_VERSION_MISMATCH
    assert first._session is not None
    assert isinstance(first._session.transport, NcclTransport)
    assert first._session.transport._communicator is None, "it would wait for an engine that never comes"
    second.sync()
    assert holds(client, second)


def test_a_begin_that_does_not_fit_changes_nothing(client: InferenceClient, trainer: Any) -> None:
    _, weights = trainer()
    weights.sync()
    assert weights._session is not None
    asked = pb.BeginUpdate(session_id=weights._session.id, base_version=2, nccl_id=b"short")
    with pytest.raises(TandemError, match=r"begin\.nccl_id"), rpc.translated():
        list(client.weights.UpdateWeights(iter([pb.UpdateWeightsRequest(begin=asked)]), timeout=10))
    assert now(client).state == pb.WEIGHT_STATE_COMMITTED
    weights.sync()


@MODES
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize(
    "where", ["joining", "gone ahead", "before any byte", "between two windows", "commit sent"]
)
def test_a_trainer_that_goes_away_leaves_the_old_version_or_nothing(
    service: WeightService, client: InferenceClient, trainer: Any, mode: str, kind: signal.Signals, where: str
) -> None:
    here, there = processes.Pipe()
    dying = processes.Process(target=host_nccl.dying_trainer, args=(service.address, mode, where, there))
    dying.start()
    assert dying.pid is not None
    try:
        assert here.poll(30)
        assert here.recv() == where
        if where != "joining":
            until_under_way(client)
        before = now(client).weight_version
        os.kill(dying.pid, kind)
        began = time.monotonic()
        while (after := now(client)).state in BUSY:
            assert time.monotonic() - began < LEASE_S + 5
            time.sleep(0.02)
        assert after.weight_version == before == 2
        torn = mode == "in_place" and where != "joining"
        assert after.state == (pb.WEIGHT_STATE_TORN if torn else pb.WEIGHT_STATE_COMMITTED)
        model, weights = trainer(mode)
        write(model, 9)
        weights.sync()
        assert holds(client, weights)
    finally:
        dying.kill()
        dying.join(10)


@MODES
def test_a_service_that_is_killed_and_started_again_gets_everything(
    service: WeightService, client: InferenceClient, trainer: Any, mode: str
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    write(model, 4)
    killed: list[float] = []

    def kill(window: int) -> None:
        if not killed:
            killed.append(time.monotonic())
            service.kill()
            service.start()

    host_nccl.sending = kill
    try:
        weights.sync()
    finally:
        host_nccl.sending = lambda window: None
    assert killed
    assert holds(client, weights)
