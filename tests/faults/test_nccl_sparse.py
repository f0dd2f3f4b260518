"""Updates by NCCL that bring what changed alone, without a GPU: everything but NCCL and the kernels is real.

tests/unit/test_patches.py has the kernels, tests/gpu/test_nccl.py the same promises between two GPUs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tandem import rpc
from tandem.errors import DataLoss, FailedPrecondition, Reason, TandemError
from tandem.weights.v1 import weights_pb2 as pb
from tests import host_nccl
from tests.host_nccl import wide
from tests.weight_service import WeightService, _processes
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.arena import Arena
from weight_transfer.sparse import bits
from weight_transfer.tiles import BREAK_EVEN, HEADER
from weight_transfer.transports import nccl_sparse
from weight_transfer.transports.base import digest_of

LEASE_S = 0.6
MODES = pytest.mark.parametrize("mode", ["in_place", "staged"])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[WeightService]:
    service = WeightService(f"unix://{tmp_path}/s", LEASE_S, wide, engine_of=host_nccl.on_a_gpu)
    service.start()
    yield service
    service.kill()


@pytest.fixture
def client(service: WeightService) -> Iterator[InferenceClient]:
    with closing(InferenceClient(service.address)) as client, host_nccl.instead_of_nccl():
        client.wait_until_serving(20)
        yield client


@pytest.fixture
def trainer(
    client: InferenceClient, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[nn.Module, PolicyWeights]]]:
    monkeypatch.setattr(nccl_sparse, "_AHEAD_BYTES", 0)  # memory of messages is used again and again
    made: list[PolicyWeights] = []

    def make(mode: str = "", dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, PolicyWeights]:
        model, how = wide().to(dtype), {"mode": mode, "timeout_s": 20}
        made.append(PolicyWeights(client, lambda: model, transport="nccl", sparse=True, **how))  # type: ignore[arg-type]
        return model, made[-1]

    yield make
    for weights in made:
        weights.detach()


def change(model: nn.Module, share: float, seed: int) -> int:
    """Other bits in that share of the elements, anywhere. Returns how many elements those are."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for parameter in model.parameters():
        flat = bits(parameter)
        where = (torch.rand(flat.shape, generator=generator) < share).nonzero().view(-1)
        flat[where] ^= torch.randint(1, 1 << 15, where.shape, generator=generator).to(flat.dtype)
        count += len(where)
    return count


def now(client: InferenceClient, *, digest: bool = False) -> Any:
    with rpc.translated():
        return client.weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=digest), timeout=10)


def holds(client: InferenceClient, weights: PolicyWeights) -> bool:
    """Whether the engine has the trainer's policy, bit for bit, as the version that it was told."""
    session = weights._session
    assert session is not None
    answer = now(client, digest=True)
    assert answer.state == pb.WEIGHT_STATE_COMMITTED
    assert answer.weight_version == weights.weight_version
    return bool(answer.digest == digest_of(session.carried, weights._policy(session.names)))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    dense = 2 * size(model)
    for seed, (share, least, most) in enumerate(
        [
            (0.0, dense, dense),  # the first is whole
            (0.01, 0, dense / 4),
            (0.01, 0, dense / 4),
            (BREAK_EVEN * 1.5, dense, dense * 1.25),  # noticed when the room was sent
            (BREAK_EVEN * 1.5, dense, dense * 1.05),
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
    count = change(other, 0.01, 6)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


@MODES
def test_an_update_that_waits_for_anothers_lease_loses_no_change(
    client: InferenceClient, trainer: Any, mode: str
) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    other = PolicyWeights(client, wide, transport="stream")
    other.open()
    held = threading.Event()

    def begin() -> Iterator[pb.UpdateWeightsRequest]:
        begin = pb.BeginUpdate(session_id=other._session.id, base_version=2)
        yield pb.UpdateWeightsRequest(begin=begin)
        for _ in range(5):
            time.sleep(0.1)
            yield pb.UpdateWeightsRequest(heartbeat=pb.Heartbeat())
        yield pb.UpdateWeightsRequest(abort=pb.AbortUpdate(untouched=True))

    def hold() -> None:
        for answer in client.weights.UpdateWeights(begin(), timeout=10):
            if answer.WhichOneof("step") == "ready":
                held.set()

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        held.wait(5)
        weights.sync()
    finally:
        holding.join()
    assert weights.history[-1].changed is None, (
        "what was found for the update that was refused is not counted on"
    )
    assert holds(client, weights)
    count = change(model, 0.01, 2)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


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
    count = change(model, 0.01, 2)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


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
    count = change(model, 0.01, 2)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


@MODES
def test_a_new_communicator_begins_with_everything(client: InferenceClient, trainer: Any, mode: str) -> None:
    model, weights = trainer(mode)
    weights.sync()
    change(model, 0.01, 1)
    weights._session.transport._leave()
    weights.sync()
    assert weights.history[-1].changed is None
    assert holds(client, weights)
    count = change(model, 0.01, 2)
    weights.sync()
    assert weights.history[-1].changed == count
    assert holds(client, weights)


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
    here, there = _processes.Pipe()
    dying = _processes.Process(
        target=host_nccl.dying_trainer, args=(service.address, mode, where, there, wide, True)
    )
    dying.start()
    assert dying.pid is not None
    try:
        assert here.poll(30)
        assert here.recv() == where
        before = now(client).weight_version
        os.kill(dying.pid, kind)
        began = time.monotonic()
        busy = (pb.WEIGHT_STATE_STAGING, pb.WEIGHT_STATE_WRITING)
        while (after := now(client)).state in busy:
            assert time.monotonic() - began < LEASE_S + 2
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
