"""Updates of engines that quantize their weights as they load: each is quantized as a checkpoint of it would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from tandem.errors import DataLoss, FailedPrecondition, Reason
from tests import models
from tests.faults import oracle, raw
from tests.services import ENGINE, ENVIRONMENT, Service, inference_service
from tests.trainers import assert_same_bits
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

#: What a CPU has kernels for that need no AMX.
QUANTIZATION = "fp8_per_channel"
Scores = list[torch.Tensor]


def vllm_alone(checkpoints: list[Path]) -> list[Scores]:
    """What each checkpoint gives in vLLM's own hands, by its own loader."""
    asked = {
        "models": {str(path): str(path) for path in checkpoints},
        "prompts": oracle.PROMPTS,
        "max_tokens": 1,
        "logprobs": True,
        "engine": {name: json.loads(value) for name, value in ENGINE.items()}
        | {"quantization": QUANTIZATION},
    }
    said = subprocess.run(
        [sys.executable, "-m", "tests.integration.vllm_reference"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
        env=os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    answers = json.loads(said.stdout.splitlines()[-1])
    return [[torch.tensor(one["logprobs"]) for one in answers[str(path)]] for path in checkpoints]


class Plane:
    """A service, trainers' models of its checkpoint, and the scores of an engine that has loaded a model from files."""

    def __init__(self, service: Service, checkpoint: Path, loaded: list[Scores]) -> None:
        self.service, self.stub, self.checkpoint = service, service.weights, checkpoint
        self.loaded = loaded

    def model(self, seed: int = 0) -> nn.Module:
        model = oracle.model_of(self.checkpoint)
        if seed:
            oracle.perturb(model, seed)
        return model

    def tensors(self, model: nn.Module) -> raw.Tensors:
        return oracle.tensors_of(model, [tensor.name for tensor in raw.manifest(self.stub)])

    def assert_serves(self, seed: int, version: int) -> None:
        """The bits of the policy, quantized to the same bits as where they come from files."""
        model, now = self.model(seed), raw.now(self.stub, digest=True)
        assert (now.weight_version, raw.state(self.stub), now.reason) == (version, "COMMITTED", "")
        assert now.digest == raw.digest_of(raw.manifest(self.stub), self.tensors(model))
        assert oracle.difference(oracle.scores(self.service), self.loaded[seed]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    checkpoints = [models.make(tmp_path_factory.mktemp("quantized"), "qwen2") for _ in range(2)]
    model = oracle.model_of(checkpoints[1])
    oracle.perturb(model, 1)
    model.save_pretrained(checkpoints[1])
    loaded = vllm_alone(checkpoints)
    assert oracle.difference(*loaded) > oracle.OTHER
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoints[0], Path(folder), quantization=QUANTIZATION) as service,
    ):
        yield Plane(service, checkpoints[0], loaded)


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It starts from the checkpoint, and is left with it."""
    yield made
    raw.restore(made.stub)


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
@pytest.mark.parametrize("mode", [raw.IN_PLACE, raw.STAGED], ids=["in place", "staged"])
def test_an_update_is_computed_with_as_if_it_were_a_checkpoint(
    plane: Plane, transport: int, mode: int
) -> None:
    with raw.Session(plane.stub, plane.tensors(plane.model()), transport, mode) as session:
        if session.shared:
            session.attach()
        for seed in (1, 0, 1):
            plane.assert_serves(seed, session.update(plane.tensors(plane.model(seed))))
    plane.assert_serves(0, raw.restore(plane.stub))


def test_parameters_may_be_engine_memory_of_which_no_byte_moves(plane: Plane) -> None:
    model = plane.model(1)
    tensors = plane.tensors(model)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    with raw.Session(plane.stub, tensors) as session:
        session.attach()
        assert all(p.aliasable and not p.reason for p in session.answer.shared.placements)
        session.update(tensors)
        before = oracle.scores(plane.service)
        found = []
        for _ in range(2):
            with session.begin() as update:
                session.view(name).mul_(-1)
                session.version = update.commit()
            found.append(oracle.scores(plane.service))
        assert oracle.difference(before, found[0]) > oracle.OTHER
        plane.assert_serves(1, session.version)


@pytest.mark.parametrize("mode", [raw.IN_PLACE, raw.STAGED], ids=["in place", "staged"])
def test_changes_alone(plane: Plane, mode: int) -> None:
    before, tensors = plane.tensors(plane.model()), plane.tensors(plane.model(1))
    with raw.Session(plane.stub, tensors, raw.STREAM, mode) as session:
        with session.begin(partial=True) as update:
            for chunk in session.sparse_chunks(tensors, before):
                update.send(sparse=chunk)
            version = update.commit(session.digest(tensors))
    plane.assert_serves(1, version)


def test_what_is_torn_is_healed(plane: Plane) -> None:
    tensors = plane.tensors(plane.model(1))
    with raw.Session(plane.stub, tensors, raw.STREAM, raw.IN_PLACE) as session:
        with session.begin() as update:
            for chunk in session.chunks(tensors):
                update.send(chunk=chunk)
            with pytest.raises(DataLoss):
                update.commit(session.digest(tensors) ^ 1)
        assert raw.state(plane.stub) == "TORN"
        plane.assert_serves(1, session.update(tensors))


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_a_trainer_in_float32(plane: Plane, transport: str) -> None:
    """Its values are cast to the checkpoint's dtype, and quantized from there."""
    model = plane.model(1).float()
    with closing(InferenceClient(plane.service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport=transport, timeout_s=30)
        weights.sync()
        plane.assert_serves(1, weights.weight_version)
        assert_same_bits(plane.service, model)
        weights.detach()


def test_an_engine_that_takes_no_updates_has_its_weights_once(plane: Plane) -> None:
    flag, engine = "--no-take-updates", {"quantization": QUANTIZATION}
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(plane.checkpoint, Path(folder), flag, **engine) as service,
    ):
        assert oracle.difference(oracle.scores(service), plane.loaded[0]) == 0
        with pytest.raises(FailedPrecondition, match="take_updates") as raised:
            raw.Session(service.weights, plane.tensors(plane.model()), raw.STREAM)
        assert raised.value.reason == Reason.TRANSPORT_UNAVAILABLE


@pytest.mark.slow
def test_an_engine_of_two_workers(plane: Plane) -> None:
    """Scales are of whole rows, of which each worker has a part: they agree on them at each update."""
    engine = {"tensor_parallel_size": 2, "distributed_executor_backend": '"mp"', "quantization": QUANTIZATION}
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(plane.checkpoint, Path(folder), **engine) as service,
    ):
        found = [
            oracle.scores(service)
        ]  # of the checkpoint as vLLM loaded it; the others add up in another order
        split = Plane(service, plane.checkpoint, found)
        tensors = split.tensors(split.model(1))
        for transport in (raw.SHARED, raw.STREAM):
            with raw.Session(split.stub, tensors, transport) as session:
                if session.shared:
                    session.attach()
                version = session.update(tensors)
                found[1:] = found[1:] or [oracle.scores(service)]
                split.assert_serves(1, version)
                split.assert_serves(0, raw.restore(split.stub))
        assert oracle.difference(*found) > oracle.OTHER
        assert max(map(oracle.difference, found, plane.loaded)) < oracle.OTHER
