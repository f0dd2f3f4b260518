"""One trainer and several services that take its weights by NCCL, without a GPU: any of them dies, and comes back."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from inference_service import worker_link
from inference_service.arenas import HostArenas
from tandem.errors import DataLoss, InvalidArgument, Reason
from tests import host_nccl
from tests.faults.test_nccl_split import network as splittable
from tests.fleets import change
from tests.host_nccl import on_a_gpu, write
from tests.over_nccl import DTYPES
from tests.policies import Engine
from tests.split_nccl import on_two_gpus
from tests.weight_service import EngineOf, WeightService, engine_arenas, idle
from trainer_service.client import InferenceClient
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights
from weight_transfer.arena import align
from weight_transfer.cuda import nccl
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.transports.outgoing import Buckets, Mirror

LEASE_S = 1.0
NOTICED_S = 2.0 + 4.0
"""One that stands still is given up after 1.8 s; the rest is for a busy machine."""


def on_a_gpu_that_meets_nobody(model: nn.Module) -> Any:
    """One whose NCCL says that it is there, and cannot join."""
    made = on_a_gpu(model)

    def fails(*_: Any, **__: Any) -> None:
        raise nccl.NcclError("no route to host")

    nccl.Communicator = fails  # type: ignore[assignment,misc]
    return made


def on_a_gpu_that_rests_soon(model: nn.Module) -> Any:
    """One whose worker gives memory back that it does not need for a fifth of a second."""
    worker_link._IDLE_S = 0.2
    return on_a_gpu(model)


def on_a_gpu_the_other_way_round(model: nn.Module) -> Any:
    """One whose memory has another layout than that of the others."""

    def reversed_arenas(model: nn.Module) -> HostArenas:
        placed = engine_arenas(model)
        end = placed.arenas[0].size
        offsets = {
            p.spec.name: end - p.blocks[0].arena_offset - align(p.spec.nbytes) for p in placed.placements
        }
        moved = [
            replace(p, blocks=(replace(p.blocks[0], arena_offset=offsets[p.spec.name]),))
            for p in placed.placements
        ]
        return HostArenas(placed.arenas, moved)

    return on_a_gpu(model, reversed_arenas)


class Fleet:
    """Services, the clients that look at them, and a trainer's weights."""

    def __init__(self, folder: str, engines: Sequence[EngineOf], model: nn.Module, **how: Any) -> None:
        self.model = model
        self.services = [
            WeightService(f"unix://{folder}/{n}", LEASE_S, splittable, engine_of)
            for n, engine_of in enumerate(engines)
        ]
        self.engines = [Engine(service.address) for service in self.services]
        self.clients = [InferenceClient(service.address) for service in self.services]
        self.weights = ReplicatedWeights(self.clients, lambda: model, timeout_s=60, **how)

    def start(self, *which: int) -> None:
        for n in which or range(len(self.services)):
            self.services[n].start()
        for n in which or range(len(self.services)):
            self.engines[n].wait_until_serving(60)

    def holding(self, *which: int) -> bool:
        """Whether these, and these alone, hold the last version, bit for bit."""
        tensors = [parameter.detach() for _, parameter in sorted(self.model.named_parameters())]
        mine = combine(digest_tensors([tensor.to(torch.bfloat16) for tensor in tensors]))
        wanted = ("COMMITTED", self.weights.weight_version, mine)
        there = [(self.engines[n].state, self.engines[n].version, self.engines[n].digest) for n in which]
        return there == [wanted] * len(which) and self.weights.holding() == {
            self.services[n].address for n in which
        }

    def ways(self) -> list[str]:
        return [
            "" if member.out else member.session.transport.name for member in self.weights._roster.members
        ]

    def until_all(self, bring: Callable[[], None]) -> None:
        """A channel waits before it connects anew."""
        for _ in range(200):
            bring()
            if len(self.weights.holding()) == len(self.services):
                return
            threading.Event().wait(0.05)
        raise AssertionError(f"only {self.weights.holding()} came back")

    def stop(self) -> None:
        self.weights.detach()
        for engine, client, service in zip(self.engines, self.clients, self.services, strict=True):
            engine.close()
            client.close()
            service.kill()


@pytest.fixture
def fleet() -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, host_nccl.instead_of_nccl():

        def make(
            *engines: EngineOf, dtype: torch.dtype = torch.bfloat16, start: bool = True, **how: Any
        ) -> Fleet:
            made.append(Fleet(folder, engines, splittable(dtype), **how))
            if start:
                made[-1].start()
            return made[-1]

        yield make
        for one in made:
            one.stop()


@pytest.fixture(autouse=True)
def _wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test does to the wire is undone, whatever it comes to."""
    monkeypatch.setattr(host_nccl, "carried", host_nccl.carried)


@DTYPES
def test_every_replica_holds_the_same_bits(fleet: Any, dtype: torch.dtype) -> None:
    two = fleet(on_a_gpu, on_a_gpu, dtype=dtype)
    for seed in range(3):
        write(two.model, seed)
        two.weights.sync()
        assert two.holding(0, 1)
    assert two.ways() == ["nccl", "nccl"]
    assert two.weights.transport == "nccl"
    assert two.weights.bytes_moved == 2 * sum(p.numel() for p in two.model.parameters())
    ((_, outgoing),) = two.weights._fleet._outgoing
    assert isinstance(outgoing, Mirror if dtype == torch.bfloat16 else Buckets), "one for both"


def test_bytes_travel_to_all_at_the_same_time(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu)
    two.weights.sync()
    both = threading.Barrier(2)

    def together(window: int, memory: memoryview) -> memoryview:
        both.wait(5)  # it breaks where one comes after the other
        return memory

    host_nccl.carried = together
    change(two.model)
    two.weights.sync()
    assert two.holding(0, 1)


@DTYPES
def test_replicas_of_different_layouts(fleet: Any, dtype: torch.dtype) -> None:
    four = fleet(on_a_gpu_the_other_way_round, on_two_gpus, idle, on_two_gpus, dtype=dtype)
    for seed in range(3):
        write(four.model, seed)
        four.weights.sync()
        assert four.holding(0, 1, 2, 3)
    assert four.ways() == ["nccl", "nccl", "stream", "nccl"]
    assert four.weights.transport == "nccl_stream"
    kinds = [type(outgoing) for _, outgoing in four.weights._fleet._outgoing]
    assert kinds == ([Mirror, Buckets] if dtype == torch.bfloat16 else [Buckets, Buckets])


def test_one_that_is_prepared_keeps_what_it_has_until_all_are(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes by NCCL are there long before those that are streamed."""
    two = fleet(on_a_gpu_that_rests_soon, idle)
    two.weights.sync()
    assert two.ways() == ["nccl", "stream"]
    change(two.model)
    send, waited = Member.send, []

    def slowly(member: Member, piece: Any) -> None:
        if not waited:
            waited.append(time.sleep(1.0))
        send(member, piece)

    monkeypatch.setattr(Member, "send", slowly)
    two.weights.sync()
    assert waited
    assert two.holding(0, 1)
    assert two.ways() == ["nccl", "stream"]


def test_parameters_are_the_trainers_own_again(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu)
    own = [p.data_ptr() for p in two.model.parameters()]
    values = [p.detach().clone() for p in two.model.parameters()]
    two.weights.sync()
    mirrored = [p.data_ptr() for p in two.model.parameters()]
    assert not set(own) & set(mirrored)
    two.weights.detach()
    assert not set(mirrored) & {p.data_ptr() for p in two.model.parameters()}
    assert all(map(torch.equal, two.model.parameters(), values))


def test_bytes_that_change_on_the_way_to_one_are_committed_by_nobody(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu)
    two.weights.sync()
    before = [(engine.version, engine.digest) for engine in two.engines]
    spoilt: list[int] = []

    def carried(window: int, memory: memoryview) -> memoryview:
        if spoilt:
            return memory
        spoilt.append(window)
        return memoryview(bytes([memory[0] ^ 1]) + bytes(memory[1:]))

    host_nccl.carried = carried
    change(two.model)
    with pytest.raises(DataLoss) as lost:
        two.weights.sync()
    assert lost.value.reason == Reason.DIGEST_MISMATCH
    assert [(engine.version, engine.digest) for engine in two.engines] == before
    assert [engine.state for engine in two.engines] == ["COMMITTED"] * 2
    two.weights.sync()
    assert two.holding(0, 1)


@DTYPES
@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_one_that_dies_while_it_receives_is_dropped_and_comes_back(
    fleet: Any, how: str, dtype: torch.dtype
) -> None:
    two = fleet(on_a_gpu, on_a_gpu, dtype=dtype)
    two.weights.sync()
    change(two.model)
    died: list[float] = []
    lock = threading.Lock()

    def carried(window: int, memory: memoryview) -> memoryview:
        with lock:
            if not died:
                getattr(two.services[1], how)()
                died.append(time.monotonic())
        return memory

    host_nccl.carried = carried
    two.weights.sync()
    assert time.monotonic() - died[0] < NOTICED_S
    assert two.holding(0)
    two.services[1].thaw() if how == "freeze" else two.start(1)
    two.until_all(two.weights.catch_up)
    assert two.holding(0, 1), "before another version is made"
    change(two.model)
    two.weights.sync()
    assert two.holding(0, 1)
    assert two.ways() == ["nccl", "nccl"]


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("step", ["begin", "prepare", "commit"])
def test_one_that_dies_at_another_step_is_dropped(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, how: str, step: str
) -> None:
    two = fleet(on_a_gpu, on_a_gpu)
    if step != "begin":  # else both have to join
        two.weights.sync()
    change(two.model)
    real, died = getattr(Member, step), []
    lock = threading.Lock()

    def dies(member: Member, *args: Any, **kwargs: Any) -> Any:
        with lock:
            if not died:
                getattr(two.services[1], how)()
                died.append(time.monotonic())
        return real(member, *args, **kwargs)

    monkeypatch.setattr(Member, step, dies)
    two.weights.sync()
    assert time.monotonic() - died[0] < NOTICED_S
    assert two.holding(0)
    two.services[1].thaw() if how == "freeze" else two.start(1)
    two.until_all(two.weights.sync)
    assert two.holding(0, 1)


def test_one_that_comes_late_is_given_everything(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu, start=False)
    two.start(0)
    two.weights.sync()
    assert two.holding(0)
    two.start(1)
    two.until_all(two.weights.catch_up)
    assert two.holding(0, 1)
    assert two.weights.weight_version == 2


def test_one_whose_nccl_fails_goes_by_stream(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu_that_meets_nobody)
    two.until_all(two.weights.sync)
    assert two.ways() == ["nccl", "stream"]
    change(two.model)
    two.weights.sync()
    assert two.holding(0, 1)


def test_changes_alone_still_go_by_stream(fleet: Any) -> None:
    two = fleet(on_a_gpu, idle, sparse=True)
    two.weights.sync()
    with torch.no_grad():
        next(two.model.parameters())[0] += 1
    two.weights.sync()
    assert two.holding(0, 1)
    assert two.ways() == ["nccl", "stream"]
    two.services[1].kill()
    change(two.model)
    two.weights.sync()
    assert two.holding(0)
    two.start(1)
    two.until_all(two.weights.catch_up)
    change(two.model)
    two.weights.sync()
    assert two.holding(0, 1)


def test_what_changed_is_told_of_the_version_that_a_stream_last_brought(fleet: Any) -> None:
    """And not of one before it, which values go back to: the replica was given what is between by itself."""
    two = fleet(on_a_gpu, idle, sparse=True)
    two.weights.sync()
    change(two.model)
    two.weights.sync()
    values = [parameter.detach().clone() for parameter in two.model.parameters()]
    two.services[1].kill()
    change(two.model)
    two.weights.sync()
    assert two.holding(0)
    two.start(1)
    two.until_all(two.weights.catch_up)
    with torch.no_grad():
        for parameter, value in zip(two.model.parameters(), values, strict=True):
            parameter.copy_(value)
    two.weights.sync()
    assert two.holding(0, 1)


def test_stream_can_be_asked_for(fleet: Any) -> None:
    two = fleet(on_a_gpu, on_a_gpu, transport="stream")
    two.weights.sync()
    assert two.holding(0, 1)
    assert two.ways() == ["stream", "stream"]
    with pytest.raises(InvalidArgument, match="NCCL or stream"):
        ReplicatedWeights(two.clients, splittable, transport="shared")
