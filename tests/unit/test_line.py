"""The stream that carries a trainer's updates, one after the other."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inference_service.arenas import EngineArenas, HostArenas
from tandem.errors import DeadlineExceeded
from tandem.weights.v1 import weights_pb2 as pb
from tests.policies import LEASE_S, WAYS, Engine, Policy, Sgd, assert_same, engine, policy, service, step
from tests.weight_service import IdleEngine, WeightService, engine_arenas, network
from trainer_service.client import InferenceClient
from trainer_service.line import Line
from trainer_service.replicated import ReplicatedWeights
from trainer_service.weights import PolicyWeights

__all__ = ["engine", "policy", "service"]  # fixtures


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """The lines that were opened since."""
    found: list[Line] = []
    make = Line.__init__

    def made(line: Line, *arguments: Any) -> None:
        make(line, *arguments)
        found.append(line)

    monkeypatch.setattr(Line, "__init__", made)
    return found


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_one_after_the_other_however_long_the_trainer_takes_in_between(
    engine: Engine, policy: Policy, transport: str, dtype: torch.dtype, opened: list[Line]
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    optimizer = Sgd(model)
    for n in range(3):
        time.sleep(1.5 * LEASE_S if n == 1 else 0)
        step(model, optimizer)
        weights.sync()
        assert_same(engine, model)
    assert (engine.version, len(opened)) == (5, 1)
    weights.detach()
    assert not opened[0].open


def test_an_update_that_is_given_up_ends_its_stream(
    engine: Engine, policy: Policy, opened: list[Line]
) -> None:
    model = network()
    weights = policy(model)
    weights.sync()
    with pytest.raises(ZeroDivisionError), weights.update():
        1 / 0  # noqa: B018
    assert [line.open for line in opened] == [False]
    weights.sync()
    assert_same(engine, model)
    assert [line.open for line in opened] == [False, True]


def test_a_service_that_was_started_again_is_reached_by_another(
    service: WeightService, engine: Engine, policy: Policy, opened: list[Line]
) -> None:
    model = network()
    weights = policy(model, "stream")
    weights.sync()
    service.kill()
    service.start()
    engine.wait_until_serving(30)
    weights.sync()
    assert_same(engine, model)
    assert [line.open for line in opened][-1]
    assert not any(line.open for line in opened[:-1])


def test_an_update_has_its_own_deadline_and_ends_its_line_with_it(
    engine: Engine, policy: Policy, opened: list[Line]
) -> None:
    weights = policy(network())
    weights.sync()
    lease = weights._session.begin(3, timeout_s=0.2)
    time.sleep(LEASE_S)  # several heartbeats
    with pytest.raises(DeadlineExceeded, match=r"The update took more than 0\.2 s"):
        lease.commit(None)
    assert engine.state == "TORN"
    assert not opened[-1].open


def test_a_stream_whose_own_deadline_is_too_near_is_left(
    engine: Engine, policy: Policy, opened: list[Line]
) -> None:
    weights = policy(network())
    weights.sync()
    session = weights._session
    session.weight_version, _ = session.begin(3, timeout_s=900.0).commit(None)
    assert len(opened) == 1, "the first lasts long enough"
    session.weight_version, _ = session.begin(4, timeout_s=3600.5).commit(None)
    assert [line.open for line in opened] == [False, True]
    assert engine.version == 4


class Noting(IdleEngine):
    """Notes when it was told to stop."""

    def __init__(self, arenas: HostArenas, note: Path) -> None:
        super().__init__(arenas)
        self._note = note

    async def halt(self, *arguments: Any, **named: Any) -> Any:
        self._note.write_text(str(time.monotonic()))
        return await super().halt(*arguments, **named)


def noting(note: Path, model: nn.Module) -> tuple[IdleEngine, EngineArenas]:
    arenas = engine_arenas(model)
    return Noting(arenas, note), arenas


def test_an_update_has_begun_before_the_trainer_does_anything_else(
    tmp_path: Path, socket_folder: Path
) -> None:
    """Though another thread sends that, which gets no turn while this one computes."""
    told = tmp_path / "told"
    service = WeightService(f"unix://{socket_folder}/s", LEASE_S, engine_of=partial(noting, told))
    service.start()
    client = InferenceClient(service.address)
    client.wait_until_serving(30)
    model = network()
    weights = PolicyWeights(client, lambda: model)
    weights.sync()
    computed: list[float] = []
    before = sys.getswitchinterval()

    def compute() -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
        computed.append(end)

    try:
        sys.setswitchinterval(10)
        lease = weights._session.begin(3, meanwhile=compute)
    finally:
        sys.setswitchinterval(before)
    lease.commit(None)
    assert float(told.read_text()) < computed[0]
    weights.detach()
    client.close()
    service.kill()


def test_nobody_keeps_the_stream_of_a_trainer_that_was_forgotten(
    service: WeightService, engine: Engine, opened: list[Line]
) -> None:
    client = InferenceClient(service.address)
    weights = PolicyWeights(client, network)
    weights.sync()
    assert opened[0].open
    del weights
    gc.collect()
    assert not opened[0].open
    client.close()


def test_nobody_keeps_the_streams_of_replicas_whose_trainer_was_forgotten(
    service: WeightService, engine: Engine, opened: list[Line]
) -> None:
    client = InferenceClient(service.address)
    model = network()
    weights = ReplicatedWeights([client], lambda: model)
    weights.sync()
    call = opened.pop().call
    assert call.is_active()
    del weights
    gc.collect()
    assert not call.is_active()
    client.close()


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_a_service_that_keeps_no_stream_is_begun_with_anew(
    engine: Engine,
    policy: Policy,
    transport: str,
    dtype: torch.dtype,
    opened: list[Line],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of the build before, which know no `keep_stream`. The trainer learns of the end a moment later."""
    make = pb.BeginUpdate

    def unkept(**fields: Any) -> pb.BeginUpdate:
        return make(**fields | {"keep_stream": False})

    monkeypatch.setattr("trainer_service.session.pb.BeginUpdate", unkept)
    model = network(dtype)
    weights = policy(model, transport)
    optimizer = Sgd(model)
    for _ in range(30):
        step(model, optimizer)
        weights.sync()
    assert_same(engine, model)
    assert engine.version == 31
    assert len(opened) >= engine.version - 1


def test_in_a_process_that_is_forked_from_the_trainers_it_is_closed_and_cannot_be(
    engine: Engine, policy: Policy, opened: list[Line]
) -> None:
    weights = policy(network(), "stream")
    weights.sync()
    child = os.fork()
    if child == 0:
        opened[0].close()
        os._exit(int(opened[0].open))
    assert os.waitpid(child, 0)[1] == 0
    time.sleep(0.2)
    assert opened[0].open
    weights.sync()
    assert len(opened) == 1


def test_no_thread_is_left_of_streams_that_ended(service: WeightService, engine: Engine) -> None:
    def threads() -> int:
        gc.collect()
        return threading.active_count()

    before = threads()
    for _ in range(4):
        client = InferenceClient(service.address)
        weights = PolicyWeights(client, network, transport="stream")
        weights.sync()
        client.close()  # the channel first: the stream ends with it
        del weights
    until = time.monotonic() + 10
    while threads() > before + 1:  # the heart's
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.05)
