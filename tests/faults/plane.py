"""A service with the checkpoint in it, what must not change of it, and a trainer's model that is another one."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.errors import Aborted, Reason, Unavailable
from tandem.inference.v1 import inference_pb2
from tests.faults import oracle, raw
from tests.faults.oracle import NOISE
from tests.faults.raw import STREAM, Tensors
from tests.faults.trainer_process import tensors_for
from tests.services import Service

#: A trainer that falls silent is given up after 2 s; the rest is for a busy machine.
NOTICED_S = 2.0 + 2.0


class Plane:
    """A running service of a checkpoint, and trainers of another policy."""

    def __init__(self, service: Service, checkpoint: Path) -> None:
        self.service = service
        self.stub = service.weights
        self.old = oracle.model_of(checkpoint)
        self.new = oracle.model_of(checkpoint, torch.float32)
        oracle.perturb(self.new, 5)
        self.names = [spec.name for spec in raw.manifest(self.stub)]
        self.tensors = oracle.tensors_of(self.new, self.names)
        self.start()

    def start(self) -> None:
        """Remember what must not change."""
        now = raw.now(self.stub, digest=True)
        self.version, self.digest = now.weight_version, now.digest
        self.scores = oracle.scores(self.service)

    def open(self, transport: int = 0, tensors: Tensors | None = None, **identity: object) -> raw.Session:
        session = raw.Session(self.stub, tensors or self.tensors, transport, **identity)
        return session.attach() if session.shared else session

    def assert_unchanged(self) -> None:
        """The old version serves: the same bits, the same logprobs."""
        now = raw.now(self.stub, digest=True)
        assert (now.weight_version, now.digest, now.reason) == (self.version, self.digest, "")
        assert raw.state(self.stub) == "COMMITTED"
        assert oracle.difference(self.scores, oracle.scores(self.service)) == 0
        assert self.service.health() == "SERVING"

    def assert_torn(self, why: str) -> None:
        """Nothing is served, and everybody is told why."""
        now = raw.now(self.stub)
        assert (raw.state(self.stub), now.weight_version) == ("TORN", self.version)
        assert why in now.reason
        assert self.service.health() == "NOT_SERVING"
        assert self.service.health("tandem.weights.v1.WeightService") == "SERVING"
        for call in (
            lambda: oracle.scores(self.service),
            lambda: list(self.service.inference.Generate(generate(), timeout=10)),
        ):
            with pytest.raises(Unavailable) as caught, rpc.translated():
                call()
            assert caught.value.reason == Reason.ENGINE_TORN
            assert why in caught.value.message
        model = self.service.inference.GetModel(inference_pb2.GetModelRequest(), timeout=5)
        assert model.state == engine_pb2.SERVING_STATE_TORN
        assert why in model.reason

    def assert_serves(self, model: nn.Module, version: int) -> None:
        now = raw.now(self.stub)
        assert (now.weight_version, raw.state(self.stub), now.reason) == (version, "COMMITTED", "")
        assert oracle.far_from(self.service, model) < NOISE
        assert self.service.health() == "SERVING"

    def wait_until_alone(self) -> None:
        """Wait until the service has noticed that no trainer shares the memory, or has a session to share it."""
        end = time.monotonic() + 10
        while True:
            try:
                self.open(STREAM)
            except Aborted:
                assert time.monotonic() < end
            else:
                return

    def assert_holds(self, seed: int) -> None:
        """The engine has the weights that a trainer process made of `seed`."""
        manifest = raw.manifest(self.stub)
        now = raw.now(self.stub, digest=True)
        assert (raw.state(self.stub), now.reason) == ("COMMITTED", "")
        assert now.digest == raw.digest_of(manifest, tensors_for(manifest, seed))
        assert self.service.health() == "SERVING"


def generate() -> inference_pb2.GenerateRequest:
    prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]))
    return inference_pb2.GenerateRequest(prompts=[prompt])


def descriptors_of(service: Service) -> dict[str, int]:
    """How many descriptors of each kind the service and its engine have open."""
    count: dict[str, int] = {}
    for pid in (service.process.pid, *service.children()):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                kind = os.readlink(fd).split(":")[0]
                count[kind] = count.get(kind, 0) + 1
    return count


Held = tuple[dict[str, int], int, int]


def what_is_left(service: Service) -> Held:
    """What is held once nothing of what went before is still being closed, here or there."""
    gc.collect()
    held, end = what_is_held(service), time.monotonic() + 10
    while True:
        time.sleep(0.2)
        if (now := what_is_held(service)) == held:
            return held
        assert time.monotonic() < end, f"it does not come to rest: {held}, then {now}"
        held = now


def what_is_held(service: Service) -> Held:
    """Descriptors of each kind, mappings of memory files, processes: what faults must not add to."""
    maps = Path(f"/proc/{service.process.pid}/maps").read_text().count("memfd:")
    return descriptors_of(service), maps, len(service.children())
