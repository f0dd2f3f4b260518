"""Updates by NCCL that bring what changed alone, without a GPU: everything but NCCL and the kernels is real.

tests/unit/test_patches.py has the kernels, tests/gpu/test_nccl.py the same promises between two GPUs.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tandem.errors import Aborted, DataLoss, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import host_nccl
from tests.host_nccl import wide
from tests.over_nccl import MODES, holds
from tests.sparse_nccl import assert_changes_travel_alone, change, client, memory, service, size, trainer
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.session import Session
from trainer_service.weights import PolicyWeights
from weight_transfer.arena import Arena
from weight_transfer.sparse import bits
from weight_transfer.tiles import BREAK_EVEN, HEADER, LAYOUT, STAGED_BREAK_EVEN
from weight_transfer.transports import nccl_sparse

__all__ = ["client", "memory", "service", "trainer"]  # fixtures


@MODES
def test_each_update_is_the_trainers_to_the_bit(client: InferenceClient, trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    assert weights.history[-1].changed is None
    # Beyond the break-even and back; a share of which the room of the last message is too little; nothing at all.
    for i, share in enumerate([0.01, 0.01, 0.0, 0.02, 0.15, 0.15, 1.0, 0.01, 0.01, 0.3, 0.001, 0.5]):
        count = change(model, share, i)
        weights.sync()
        assert weights.history[-1].changed == count
        assert holds(client, weights)
    assert [update.weight_version for update in weights.history] == list(range(2, 15))


def test_a_trainer_that_lays_changes_out_otherwise_sends_all(
    client: InferenceClient, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_service.session.LAYOUT", LAYOUT + 1)
    model, weights = trainer("staged")
    for seed in range(2):
        change(model, 0.01, seed)
        weights.sync()
        assert weights.history[-1].changed is None
        assert holds(client, weights)


@MODES
@pytest.mark.parametrize("seed", range(3))
def test_whatever_fails_on_the_way_what_is_committed_is_the_trainers(
    client: InferenceClient, trainer: Any, mode: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random shares of changes, and random failures between them: of the wire, of a digest, of parameters' memory."""
    model, weights = trainer(mode)
    weights.sync()
    chance, partial = random.Random(seed), 0
    wait = host_nccl.HostCommunicator.wait
    for i in range(25):
        change(model, chance.choice([0.0, 0.001, 0.01, 0.05, 0.2, 0.6]), 100 * seed + i)
        match chance.randrange(6):
            case 0:  # the communicator breaks at some window
                left = [chance.randrange(12)]

                def breaks(communicator: Any, *of: Any, left: list[int] = left) -> None:
                    left[0] -= 1
                    if left[0] == -1:
                        raise host_nccl.nccl.NcclError("broken")
                    wait(communicator, *of)

                monkeypatch.setattr(host_nccl.HostCommunicator, "wait", breaks)
            case 1:  # a byte is another on the way: of a tensor, or of how many changes a tile has
                spoilt: list[int] = []

                def spoil(window: int, memory: memoryview, spoilt: list[int] = spoilt) -> memoryview:
                    at = 4 * (HEADER + 1)
                    if spoilt or len(memory) <= 64:  # rooms, of which NCCL's own sizes are made
                        return memory
                    spoilt.append(window)
                    return memoryview(bytes(memory[:at]) + bytes([memory[at] ^ 1]) + bytes(memory[at + 1 :]))

                monkeypatch.setattr(host_nccl, "carried", spoil)
            case 2:
                parameter = next(model.parameters())
                parameter.data = parameter.data.clone()
        with contextlib.suppress(DataLoss):
            weights.sync()
        monkeypatch.setattr(host_nccl, "carried", lambda window, memory: memory)
        monkeypatch.setattr(host_nccl.HostCommunicator, "wait", wait)
        weights.sync()
        assert holds(client, weights)
        partial += weights.history[-1].changed is not None
    assert partial > 5


@MODES
def test_few_changes_are_few_bytes_and_many_are_no_more_than_all(trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    dense, break_even = 2 * size(model), STAGED_BREAK_EVEN if mode == "staged" else BREAK_EVEN
    for seed, (share, least, most) in enumerate(
        [
            (0.0, dense, dense),  # the first is whole
            (0.01, 0, dense / 4),
            (0.01, 0, dense / 4),
            (break_even * 1.5, dense, dense * 1.25),  # noticed when the room was sent
            (break_even * 1.5, dense, dense * 1.05),
            (break_even * 0.7, 0, dense * 1.05),  # and that changes would do
            (break_even * 0.7, 0, dense * 0.7),
        ]
    ):
        change(model, share, seed)
        weights.sync()
        assert least <= weights.bytes_moved <= most


def test_bits_count_and_not_values(client: InferenceClient, trainer: Any) -> None:
    model, weights = trainer()
    bits(next(model.parameters()))[:3] = torch.tensor([0, 0x7FC0, 0x7FC0]).to(torch.int16)
    weights.sync()
    flat = bits(next(model.parameters()))  # it is in the mirror now
    flat[0], flat[1] = -0x8000, 0x7FC1
    weights.sync()
    assert weights.history[-1].changed == 2
    assert holds(client, weights)


@MODES
def test_parameters_that_are_cast_on_the_way_travel_whole(
    client: InferenceClient, trainer: Any, mode: str
) -> None:
    model, weights = trainer(mode, torch.float32)
    for seed in range(2):
        host_nccl.write(model, seed)
        weights.sync()
        assert weights.history[-1].changed is None
        assert weights.bytes_moved == 2 * size(model)
        assert holds(client, weights)


def test_a_parameter_that_was_given_other_memory_is_looked_at(client: InferenceClient, trainer: Any) -> None:
    model, weights = trainer()
    weights.sync()
    first = next(model.parameters())
    other = first.detach().clone()
    bits(other)[7] ^= 1
    first.data = other
    weights.sync()
    assert weights.history[-1].changed == 1
    assert holds(client, weights)


def test_another_model_in_the_place_of_the_first_is_looked_at(trainer: Any, client: InferenceClient) -> None:
    _, weights = trainer()
    weights.sync()
    weights.sync()
    other = wide()
    change(other, 0.01, 5)
    weights._model = lambda: other
    weights.sync()
    assert holds(client, weights)
    assert_changes_travel_alone(client, weights, other, seed=6)


@MODES
def test_an_update_that_waits_for_anothers_lease_loses_no_change(
    client: InferenceClient, trainer: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    other = PolicyWeights(client, wide, transport="stream")
    other.open()
    held, refused = threading.Event(), threading.Event()
    real = Session.begin

    def may_be_refused(session: Session, *args: Any, **kwargs: Any) -> Lease:
        try:
            return real(session, *args, **kwargs)
        except Aborted as error:
            assert error.reason == Reason.LEASE_HELD  # noqa: PT017
            refused.set()
            raise

    def begin() -> Iterator[pb.UpdateWeightsRequest]:
        begin = pb.BeginUpdate(session_id=other._session.id, base_version=2)
        yield pb.UpdateWeightsRequest(begin=begin)
        end = time.monotonic() + 10
        while not refused.wait(0.1) and time.monotonic() < end:
            yield pb.UpdateWeightsRequest(heartbeat=pb.Heartbeat())
        yield pb.UpdateWeightsRequest(abort=pb.AbortUpdate(untouched=True))

    def hold() -> None:
        for answer in client.weights.UpdateWeights(begin(), timeout=20):
            if answer.WhichOneof("step") == "ready":
                held.set()

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        assert held.wait(5)
        monkeypatch.setattr(Session, "begin", may_be_refused)
        weights.sync()
    finally:
        refused.set()
        holding.join()
    assert weights.history[-1].changed is None, (
        "what was found for the update that was refused is not counted on"
    )
    assert holds(client, weights)
    assert_changes_travel_alone(client, weights, model, seed=2)


def test_without_memory_for_a_base_updates_stay_whole(
    client: InferenceClient, trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(name: str, size: int, device: Any = "cpu") -> Arena:
        if name == "tandem-base":
            raise RuntimeError("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY")
        return Arena.create(name, size, device)

    monkeypatch.setattr(nccl_sparse, "Arena", type("Full", (), {"create": staticmethod(full)}))
    model, weights = trainer()
    for seed in range(3):
        change(model, 0.01, seed)
        weights.sync()
        assert weights.history[-1].changed is None
        assert holds(client, weights)
    assert "no memory for what the engine has committed" in caplog.text
