"""Updates of engines with experts, which vLLM computes with in a form of its own: each reaches that form too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tandem.errors import DataLoss
from tests.faults import checkpoints as more
from tests.faults import oracle, raw
from tests.faults.oracle import EXACT, OTHER
from tests.ranks import ON_CPU, ROOT, succeeded, two_ranks
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, make
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

#: What each architecture calls an expert's gate, up and down projections.
PARTS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


class Plane:
    """A service in float32, where every number can be checked closely, and trainers' models of its checkpoint."""

    def __init__(self, name: str, service: Service, checkpoint: Path) -> None:
        self.name, self.service, self.stub, self.checkpoint = name, service, service.weights, checkpoint

    def model(self, seed: int = 0) -> nn.Module:
        model = oracle.model_of(self.checkpoint, torch.float32)
        if seed:
            oracle.perturb(model, seed)
        return model

    def tensors(self, model: nn.Module) -> raw.Tensors:
        """The policy as its checkpoint has it."""
        state = model.state_dict()
        if self.name == "mixtral":
            state = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in state.items()}
        return more.unfused(state, *PARTS[self.name])

    def assert_serves(self, model: nn.Module, version: int, session: raw.Session) -> None:
        """The same bits, and what transformers computes with them."""
        now = raw.now(self.stub, digest=True)
        assert (now.weight_version, raw.state(self.stub), now.reason) == (version, "COMMITTED", "")
        assert now.digest == session.digest(self.tensors(model))
        assert oracle.far_from(self.service, model, torch.float32) < EXACT


@pytest.fixture(scope="module", params=sorted(PARTS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    name: str = request.param
    checkpoint = more.make(tmp_path_factory.mktemp(name), name, torch.float32)
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoint, Path(folder), dtype="float32") as service,
    ):
        yield Plane(name, service, checkpoint)


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It starts from the checkpoint, and is left with it."""
    yield made
    raw.restore(made.stub)


def test_the_checkpoint_is_served_and_restored(plane: Plane) -> None:
    original, other = plane.model(), plane.model(seed=4)
    with raw.Session(plane.stub, plane.tensors(original), raw.STREAM) as session:
        plane.assert_serves(original, session.version, session)
        version = session.update(plane.tensors(other))
        plane.assert_serves(other, version, session)
        assert raw.restore(plane.stub) == version + 1
        plane.assert_serves(original, version + 1, session)


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
@pytest.mark.parametrize("mode", [raw.IN_PLACE, raw.STAGED], ids=["in place", "staged"])
def test_an_update_reaches_what_is_computed_with(plane: Plane, transport: int, mode: int) -> None:
    """Twice, since the second load anew meets what the first left."""
    before = oracle.scores(plane.service)
    model = plane.model(seed=1)
    with raw.Session(plane.stub, plane.tensors(model), transport, mode) as session:
        if session.shared:
            session.attach()
        for seed in (2, 3):
            version = session.update(plane.tensors(model))
            plane.assert_serves(model, version, session)
            assert oracle.difference(before, oracle.scores(plane.service)) > OTHER
            oracle.perturb(model, seed)


def test_experts_alone_may_change_and_be_engine_memory(plane: Plane) -> None:
    """No byte moves: the expert is written where it lies, and the commit has vLLM pack it."""
    model = plane.model(seed=1)
    tensors = plane.tensors(model)
    name = next(n for n in tensors if n.endswith(f".experts.1.{PARTS[plane.name][2]}.weight"))
    with raw.Session(plane.stub, tensors) as session:
        session.attach()
        assert all(p.aliasable and not p.reason for p in session.answer.shared.placements)
        session.update(tensors)  # the first update writes everything
        before = oracle.scores(plane.service)
        tensors[name].mul_(-1)  # a view of the model's
        with session.begin() as update:
            session.view(name).mul_(-1)
            version = update.commit()
        plane.assert_serves(model, version, session)
        assert oracle.difference(before, oracle.scores(plane.service)) > 10 * EXACT


@pytest.mark.parametrize("mode", [raw.IN_PLACE, raw.STAGED], ids=["in place", "staged"])
def test_changes_alone(plane: Plane, mode: int) -> None:
    model = plane.model()
    before = {name: tensor.clone() for name, tensor in plane.tensors(model).items()}
    tensors = plane.tensors(model)
    name = next(n for n in tensors if n.endswith(f".experts.2.{PARTS[plane.name][0]}.weight"))
    tensors[name][:, ::16] *= -2  # a view of the model's
    with raw.Session(plane.stub, tensors, raw.STREAM, mode) as session:
        with session.begin(partial=True) as update:
            for chunk in session.sparse_chunks(tensors, before):
                update.send(sparse=chunk)
            version = update.commit(session.digest(tensors))
        plane.assert_serves(model, version, session)


def test_what_is_torn_is_healed(plane: Plane) -> None:
    model = plane.model(seed=5)
    tensors = plane.tensors(model)
    with raw.Session(plane.stub, tensors, raw.STREAM, raw.IN_PLACE) as session:
        with session.begin() as update:
            for chunk in session.chunks(tensors):
                update.send(chunk=chunk)
            with pytest.raises(DataLoss):
                update.commit(session.digest(tensors) ^ 1)
        assert raw.state(plane.stub) == "TORN"
        version = session.update(tensors)
        plane.assert_serves(model, version, session)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_a_policy_of_transformers_whose_experts_are_one_parameter(plane: Plane, transport: str) -> None:
    model = plane.model()
    with (
        closing(InferenceClient(plane.service.address)) as client,
        raw.Session(plane.stub, plane.tensors(model), raw.STREAM) as session,
    ):
        weights = PolicyWeights(client, lambda: model, transport=transport, timeout_s=30)
        for seed in (6, 7):
            with weights.update():
                oracle.perturb(model, seed)
            weights.sync()
            assert_same_bits(plane.service, model)
            plane.assert_serves(model, raw.now(plane.stub).weight_version, session)
        weights.detach()


@pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_run_of_grpo(plane: Plane, tmp_path: Path, mode: str) -> None:
    """Each step's rollouts are of the policy that the step before made."""
    model: Any = plane.model()
    trainer = make("grpo", plane.service, model, tmp_path, vllm_mode=mode, max_steps=3, learning_rate=0.01)
    try:
        before = {name: tensor.clone() for name, tensor in plane.tensors(model).items()}
        trainer.train()
        differences = logged(trainer, "sampling/sampling_logp_difference/max")
        assert len(differences) == 3
        assert max(differences) < EXACT
        trainer.vllm_generation.sync_weights()
        assert_same_bits(plane.service, trainer.model)
        assert oracle.far_from(plane.service, model, torch.float32) < EXACT
        changed = {
            name for name, tensor in plane.tensors(model).items() if not torch.equal(tensor, before[name])
        }
        assert any(".experts." in name for name in changed)
    finally:
        trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_grpo_over_two_ranks(plane: Plane, tmp_path: Path, how: str) -> None:
    """Each has a part of all experts. The assertions are in tests/sharded_run.py: bits, and logprobs."""
    layer = {"mixtral": "MixtralDecoderLayer", "qwen3_moe": "Qwen3MoeDecoderLayer"}[plane.name]
    paths = (plane.checkpoint, plane.checkpoint, tmp_path)
    deepspeed = {"PYTHONPATH": f"{ROOT}:{ROOT}/.venv/deepspeed"}
    with two_ranks(
        "-m",
        "tests.sharded_run",
        plane.service.address,
        *paths,
        how,
        layer,
        **(ON_CPU if how != "zero3" else deepspeed),
    ) as ranks:
        for output in succeeded(ranks, 300):
            assert output.count("RAN grpo") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PARTS))
def test_an_engine_of_two_workers(name: str, tmp_path: Path) -> None:
    """vLLM loads whole tensors, of which each worker keeps its part: they lie beside it."""
    checkpoint = more.make(tmp_path / name, name, torch.float32)
    engine = {"dtype": "float32", "tensor_parallel_size": 2, "distributed_executor_backend": '"mp"'}
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoint, Path(folder), **engine) as service,
    ):
        plane = Plane(name, service, checkpoint)
        for transport in (raw.SHARED, raw.STREAM):
            model = plane.model(seed=transport)
            with raw.Session(plane.stub, plane.tensors(model), transport) as session:
                if session.shared:
                    session.attach()
                plane.assert_serves(model, session.update(plane.tensors(model)), session)
                plane.assert_serves(plane.model(), raw.restore(plane.stub), session)
