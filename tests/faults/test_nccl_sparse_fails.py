"""Updates by NCCL that bring what changed alone, where one fails: no change is lost, and nothing is mixed."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from tandem import rpc
from tandem.errors import DataLoss, FailedPrecondition, Reason, TandemError
from tandem.weights.v1 import weights_pb2 as pb
from tests import host_nccl
from tests.forks import processes
from tests.host_nccl import wide
from tests.over_nccl import BUSY, LEASE_S, MODES, holds, now, until_under_way
from tests.sparse_nccl import assert_changes_travel_alone, change, client, memory, service, trainer
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.tiles import HEADER
from weight_transfer.transports.base import digest_of

__all__ = ["client", "memory", "service", "trainer"]  # fixtures


def one_change_is_lost(weights: PolicyWeights, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the first message of the next update tell of one change less than was found. Returns what was done."""
    done: list[int] = []
    first = weights._session.transport.communicator._windows + 1  # behind that which tells of the rooms

    def lossy(window: int, memory: memoryview) -> memoryview:
        if window != first:
            return memory
        words = memoryview(bytearray(memory)).cast("I")
        done.append(words[HEADER + 1])
        words[HEADER + 1] -= 1
        return words.cast("B")

    monkeypatch.setattr(host_nccl, "carried", lossy)
    return done


@MODES
def test_a_commit_that_fails_loses_no_change(
    client: InferenceClient, trainer: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    before = now(client, digest=True)
    change(model, 0.02, 1)
    done = one_change_is_lost(weights, monkeypatch)
    with pytest.raises(DataLoss) as lost:
        weights.sync()
    assert done
    monkeypatch.undo()
    assert lost.value.reason == Reason.DIGEST_MISMATCH
    after = now(client)
    assert after.weight_version == before.weight_version
    if mode == "staged":
        assert now(client, digest=True).digest == before.digest
    else:
        assert after.state == pb.WEIGHT_STATE_TORN
    weights.sync()
    assert weights.history[-1].changed is None, "what the engine has is not known: it gets everything"
    assert holds(client, weights)
    assert_changes_travel_alone(client, weights, model, seed=2)


@MODES
def test_after_an_update_that_broke_off_everything_travels(
    client: InferenceClient, trainer: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    wait, broken = host_nccl.HostCommunicator.wait, []

    def breaks(communicator: Any, *of: Any) -> None:
        if not broken:
            broken.append(communicator)
            raise host_nccl.nccl.NcclError("broken")
        wait(communicator, *of)

    monkeypatch.setattr(host_nccl.HostCommunicator, "wait", breaks)
    weights.sync()  # is tried again
    assert broken
    assert weights.history[-1].changed is None
    assert holds(client, weights)
    assert_changes_travel_alone(client, weights, model, seed=2)


@MODES
def test_a_new_communicator_begins_with_everything(client: InferenceClient, trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    weights._session.transport.leave()
    weights.sync()
    assert weights.history[-1].changed is None
    assert holds(client, weights)
    assert_changes_travel_alone(client, weights, model, seed=2)


def test_another_trainers_commit_is_no_base(client: InferenceClient, trainer: Any) -> None:
    model, first = trainer("staged")
    first.sync()
    other, second = trainer("staged")
    change(other, 0.1, 1)
    second.sync()
    change(model, 0.01, 2)
    session = first._session
    assert session.transport.partial
    with pytest.raises(FailedPrecondition) as taken:
        first.sync()
    assert taken.value.reason == Reason.BASE_VERSION_MISMATCH
    assert holds(client, second)
    begin = pb.BeginUpdate(session_id=session.id, base_version=2, partial=True)
    with pytest.raises(TandemError, match="BASE_VERSION_MISMATCH"), rpc.translated():
        list(client.weights.UpdateWeights(iter([pb.UpdateWeightsRequest(begin=begin)]), timeout=10))
    change(other, 0.01, 3)
    second.sync()
    assert holds(client, second)


def test_a_communicator_that_another_trainer_made_one_give_up_is_made_anew(
    client: InferenceClient, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's update failed, so that the version is still ours."""
    model, first = trainer("staged")
    first.sync()
    _, second = trainer("staged")
    with monkeypatch.context() as patched:
        patched.setattr(host_nccl, "sending", _breaks)
        with pytest.raises(RuntimeError, match="broken"):
            second.sync()
    change(model, 0.01, 1)
    first.sync()
    assert holds(client, first)
    count = change(model, 0.01, 2)
    first.sync()
    assert first.history[-1].changed == count
    assert holds(client, first)


def _breaks(window: int) -> None:
    raise RuntimeError("broken")


def test_a_torn_engine_takes_no_changes(client: InferenceClient, trainer: Any) -> None:
    model, weights = trainer("in_place")
    weights.sync()
    session = weights._session
    begin = pb.BeginUpdate(session_id=session.id, base_version=2, partial=True)
    with pytest.raises(TandemError, match="LEASE_LOST"), rpc.translated():  # it goes away without a word
        list(client.weights.UpdateWeights(iter([pb.UpdateWeightsRequest(begin=begin)]), timeout=10))
    assert now(client).state == pb.WEIGHT_STATE_TORN
    with pytest.raises(TandemError, match="ENGINE_TORN"), rpc.translated():
        list(client.weights.UpdateWeights(iter([pb.UpdateWeightsRequest(begin=begin)]), timeout=10))
    change(model, 0.01, 1)
    weights.sync()
    assert weights.history[-1].changed is None
    assert holds(client, weights)


@MODES
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("where", ["before any byte", "between two windows"])
def test_a_trainer_that_goes_away_leaves_the_old_version_or_nothing(
    service: WeightService, client: InferenceClient, trainer: Any, mode: str, kind: signal.Signals, where: str
) -> None:
    here, there = processes.Pipe()
    dying = processes.Process(
        target=host_nccl.dying_trainer, args=(service.address, mode, where, there, wide, True)
    )
    dying.start()
    assert dying.pid is not None
    try:
        assert here.poll(30)
        assert here.recv() == where
        until_under_way(client)
        before = now(client).weight_version
        os.kill(dying.pid, kind)
        began = time.monotonic()
        while (after := now(client)).state in BUSY:
            assert time.monotonic() - began < LEASE_S + 5
            time.sleep(0.02)
        assert after.weight_version == before == 2
        torn = mode == "in_place"
        assert after.state == (pb.WEIGHT_STATE_TORN if torn else pb.WEIGHT_STATE_COMMITTED)
        if not torn:
            session = trainer()[1]
            session.open()
            assert now(client, digest=True).digest == digest_of(
                session._session.carried, session._policy(session._session.names)
            ), "the version that the trainer committed first"
        model, weights = trainer(mode)
        for seed in range(2):
            change(model, 0.01, seed)
            weights.sync()
            assert holds(client, weights)
    finally:
        dying.kill()
        dying.join(10)


@MODES
def test_a_service_that_is_killed_and_started_again_gets_everything(
    service: WeightService,
    client: InferenceClient,
    trainer: Any,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    killed: list[float] = []

    def kill(window: int) -> None:
        if not killed:
            killed.append(time.monotonic())
            service.kill()
            service.start()

    monkeypatch.setattr(host_nccl, "sending", kill)
    weights.sync()
    assert killed
    assert weights.history[-1].changed is None
    assert holds(client, weights)
    change(model, 0.01, 2)
    weights.sync()
    assert weights.history[-1].changed is not None
    assert holds(client, weights)
