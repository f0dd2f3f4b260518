"""The wire, the engine and the service of a trainer on another GPU break in the middle of an update by NCCL.

Trainers that die, and who stands still, are in test_nccl.py.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.weights.v1 import weights_pb2
from tests.faults.proxy import Proxy
from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import digest, digest_of
from tests.gpu.test_nccl import MODES, service, state, until
from tests.services import Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.weights import PolicyWeights
from weight_transfer.cuda import nccl

__all__ = ["service"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
#: Seconds until a trainer knows: 2 s of silence, and what it takes to see them.
NOTICED_S = 3.5
UNDER_WAY = (weights_pb2.WEIGHT_STATE_STAGING, weights_pb2.WEIGHT_STATE_WRITING)


@contextmanager
def trainer(address: str, checkpoint: Path, mode: str) -> Iterator[tuple[Any, PolicyWeights]]:
    """A policy on the second GPU that an engine has, and that then changed."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to("cuda:1")
    with closing(InferenceClient(address)) as client:
        weights = PolicyWeights(client, lambda: model, transport="nccl", mode=mode, timeout_s=240)
        weights.sync()
        change(model)
        try:
            yield model, weights
        finally:
            weights.detach()


def change(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.add_(0.01)


@pytest.fixture
def wire(service: Service) -> Iterator[Proxy]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with Proxy(f"{folder}/front.sock", service.address.removeprefix("unix://")) as proxy:
            yield proxy
    service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)


@MODES
@pytest.mark.parametrize("how", ["cut", "dead"])
def test_a_wire_that_breaks_leaves_the_old_version_or_nothing(
    service: Service, wire: Proxy, checkpoint: Path, mode: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all is on its way, and the commit is not. It is tried again over a wire that works."""
    broke: list[float] = []
    gave_up: list[float] = []
    found: list[tuple[float, int, int]] = []
    send, abort = Lease.send, nccl.Communicator.abort

    def aborts(communicator: nccl.Communicator) -> None:
        gave_up.append(time.monotonic())  # it takes NCCL seconds where many processes have the device
        abort(communicator)

    def breaks(lease: Lease, piece: Any) -> None:
        if not broke:
            wire.cut() if how == "cut" else wire.swallow()
            broke.append(time.monotonic())
        send(lease, piece)

    with trainer(wire.address, checkpoint, mode) as (model, weights):
        recover, before = weights._recover, state(service).weight_version

        def recovers(*arguments: Any) -> None:
            noticed = gave_up[0] - broke[0]
            until(lambda: state(service).state not in UNDER_WAY, NOTICED_S)
            after = state(service)
            found.append((noticed, after.weight_version, after.state))
            wire.carry_on()
            recover(*arguments)

        monkeypatch.setattr(weights, "_recover", recovers)
        monkeypatch.setattr(Lease, "send", breaks)
        monkeypatch.setattr(nccl.Communicator, "abort", aborts)
        weights.sync()
        torn = mode == "in_place"
        expected = weights_pb2.WEIGHT_STATE_TORN if torn else weights_pb2.WEIGHT_STATE_COMMITTED
        assert [outcome for _, *outcome in found] == [[before, expected]]
        assert found[0][0] < NOTICED_S
        assert digest(service) == (weights.weight_version, digest_of(model, service))


@MODES
def test_a_slow_wire_is_only_slow(
    service: Service, checkpoint: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No update is tried twice for that."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        back = service.address.removeprefix("unix://")
        with Proxy(f"{folder}/slow.sock", back, delay_s=0.1) as proxy:
            with trainer(proxy.address, checkpoint, mode) as (model, weights):
                monkeypatch.setattr(weights, "_recover", lambda error, deadline: pytest.fail(error.message))
                for _ in range(3):
                    change(model)
                    weights.sync()
                    assert digest(service) == (weights.weight_version, digest_of(model, service))
    service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)


class Supervised:
    """A service on the first GPU, and the one that is started when it is gone."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._checkpoint, self._folder, self._stack = checkpoint, folder, ExitStack()
        self.start()

    def start(self) -> None:
        self._stack.close()
        environment = on_devices(0)
        service = inference_service(
            self._checkpoint, self._folder, wait=False, environment=environment, **ENGINE
        )
        self.service = self._stack.enter_context(service)

    def process(self, who: str) -> int:
        if who == "service":
            return self.service.process.pid
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.service.children()}
        (engine,) = [pid for pid, command in commands.items() if b"EngineCore" in command]
        return engine

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


@MODES
@pytest.mark.parametrize("who", ["engine", "service"])
def test_who_is_killed_is_given_everything_when_it_is_back(
    checkpoint: Path, mode: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before bytes travel, and when all are on their way. The trainer is the same all the time."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, Supervised(checkpoint, Path(folder)) as there:
        there.service.wait_until("SERVING", 240)
        with trainer(there.service.address, checkpoint, mode) as (model, weights):
            recover = weights._recover
            killed: list[float] = []
            noticed: list[float] = []

            def kill() -> None:
                os.kill(there.process(who), signal.SIGKILL)
                killed.append(time.monotonic())
                if len(killed) == 2:  # an engine that had answered already would die with a commit made
                    until(lambda: there.service.health() != "SERVING", NOTICED_S)

            def recovers(*arguments: Any) -> None:
                noticed.append(time.monotonic() - killed[-1])
                until(lambda: there.service.health() != "SERVING", NOTICED_S)
                there.start()
                recover(*arguments)

            monkeypatch.setattr(weights, "_recover", recovers)
            for owner, name in ((nccl.Communicator, "broadcast"), (Lease, "send")):
                call, count = getattr(owner, name), len(killed)

                def kills(*arguments: Any, _call: Any = call, _count: int = count) -> Any:
                    if len(killed) == _count:
                        kill()
                    return _call(*arguments)

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, kills)
                    change(model)
                    weights.sync()
                there.service.wait_until("SERVING", 60)
                assert len(killed) == len(noticed) == count + 1
                assert noticed[-1] < NOTICED_S
                assert digest(there.service) == (weights.weight_version, digest_of(model, there.service))
