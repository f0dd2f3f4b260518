"""Updates of an engine with latent attention (MLA), which computes prompts and what follows with other tensors."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.faults import checkpoints as more
from tests.faults import oracle, raw
from tests.faults.oracle import EXACT, OTHER
from tests.services import Service, inference_service

#: vLLM's kernel for a CPU rotates queries wrongly whose heads are a dimension of their own, as they are here, and that
#: of AMX takes no float32.
ENGINE = {
    "dtype": "float32",
    "compilation_config": json.dumps({"custom_ops": ["-rotary_embedding"]}),
    "attention_backend": "CPU_MLA",
}
PROJECTION = "model.layers.1.self_attn.kv_b_proj.weight"


class Plane:
    """A service in float32 with latent attention and experts, and trainers' models of its checkpoint."""

    def __init__(self, service: Service, checkpoint: Path) -> None:
        self.service, self.stub, self.checkpoint = service, service.weights, checkpoint

    def model(self, seed: int = 0) -> nn.Module:
        model = oracle.model_of(self.checkpoint, torch.float32)
        if seed:
            oracle.perturb(model, seed)
        return model

    def tensors(self, model: nn.Module) -> raw.Tensors:
        """The policy as its checkpoint has it."""
        return more.unfused(model.state_dict(), "gate_proj", "up_proj", "down_proj")

    def assert_serves(self, model: nn.Module, version: int, session: raw.Session) -> None:
        """The same bits, and what transformers computes with them, of prompts and of what is sampled after them."""
        now = raw.now(self.stub, digest=True)
        assert (now.weight_version, raw.state(self.stub), now.reason) == (version, "COMMITTED", "")
        assert now.digest == session.digest(self.tensors(model))
        assert oracle.far_from(self.service, model, torch.float32) < EXACT
        rollouts = oracle.Rollouts(self.service, max_tokens=12)
        rollouts.join()
        rollouts.assert_sampled_by({version: model})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    checkpoint = more.make(tmp_path_factory.mktemp("mla"), "deepseek_v2", torch.float32)
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoint, Path(folder), **ENGINE) as service,
    ):
        yield Plane(service, checkpoint)


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It starts from the checkpoint, and is left with it."""
    yield made
    raw.restore(made.stub)


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["shared", "stream"])
@pytest.mark.parametrize("mode", [raw.IN_PLACE, raw.STAGED], ids=["in place", "staged"])
def test_an_update_reaches_what_is_computed_with(plane: Plane, transport: int, mode: int) -> None:
    """Twice, and then the checkpoint."""
    original, model = plane.model(), plane.model(seed=1)
    before = oracle.scores(plane.service)
    with raw.Session(plane.stub, plane.tensors(model), transport, mode) as session:
        if session.shared:
            session.attach()
        plane.assert_serves(original, session.version, session)
        for seed in (2, 3):
            version = session.update(plane.tensors(model))
            plane.assert_serves(model, version, session)
            assert oracle.difference(before, oracle.scores(plane.service)) > OTHER
            oracle.perturb(model, seed)
        plane.assert_serves(original, raw.restore(plane.stub), session)


def test_the_projection_alone_may_change_and_be_engine_memory(plane: Plane) -> None:
    model = plane.model(seed=1)
    tensors = plane.tensors(model)
    with raw.Session(plane.stub, tensors) as session:
        session.attach()
        assert all(p.aliasable and not p.reason for p in session.answer.shared.placements)
        session.update(tensors)  # the first update writes everything
        before = oracle.scores(plane.service)
        tensors[PROJECTION].mul_(-1)  # a view of the model's
        with session.begin() as update:
            session.view(PROJECTION).mul_(-1)
            version = update.commit()
        plane.assert_serves(model, version, session)
        assert oracle.difference(before, oracle.scores(plane.service)) > OTHER
