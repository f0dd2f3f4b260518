"""Updates of real engines, each way in which weights move: the engine then computes what transformers does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tests.faults import checkpoints as more
from tests.faults import oracle, raw
from tests.faults.oracle import NOISE, OTHER
from tests.services import Service, inference_service

ALIASED = ("llama", "qwen2", "qwen3", "bloom")
ARCHITECTURES = (*ALIASED, "gpt2")


class Plane:
    """A service, its checkpoint, and trainers' models of it."""

    def __init__(self, name: str, service: Service, checkpoint: Path) -> None:
        self.name = name
        self.service = service
        self.stub = service.weights
        self.checkpoint = checkpoint
        self.names = [spec.name for spec in raw.manifest(self.stub)]

    def model(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
        model = oracle.model_of(self.checkpoint, dtype)
        if seed:
            oracle.perturb(model, seed)
        return model

    def tensors(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return oracle.tensors_of(model, self.names)

    def digest(self) -> int:
        return raw.now(self.stub, digest=True).digest

    def assert_holds(self, model: nn.Module, version: int) -> None:
        """The engine serves `model` as `version`: the same bits, and what it computes with them."""
        now = raw.now(self.stub)
        assert (now.weight_version, raw.state(self.stub), now.reason) == (version, "COMMITTED", "")
        assert oracle.far_from(self.service, model) < NOISE
        assert self.service.health() == "SERVING"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Plane]:
    """A plane of each architecture, one after the other."""
    name: str = request.param
    if name == "llama":
        yield Plane(name, request.getfixturevalue("llama"), checkpoints[name])
        return
    checkpoint = checkpoints.get(name) or more.make(tmp_path_factory.mktemp(name), name)
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoint, Path(folder), wait=False) as service,
    ):
        service.wait_until("SERVING", 240)
        yield Plane(name, service, checkpoint)


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It starts from the checkpoint, and is left with it."""
    yield made
    raw.restore(made.stub)


def test_a_checkpoint_is_served_as_transformers_computes_it(plane: Plane) -> None:
    plane.assert_holds(plane.model(), raw.now(plane.stub).weight_version)


def test_parameters_that_are_engine_memory(plane: Plane) -> None:
    """Five optimizer steps in the engine's own memory, each committed without a byte moved."""
    model = plane.model()
    tensors = plane.tensors(model)
    with raw.Session(plane.stub, tensors) as session:
        session.attach()
        placements = dict(zip(tensors, session.answer.shared.placements, strict=True))
        if plane.name not in ALIASED:
            refused = [p.reason for p in placements.values() if not p.aliasable]
            assert "the engine holds it in another memory order" in refused
            return
        assert all(p.aliasable and not p.reason for p in placements.values())
        oracle.perturb(model, 1)
        tensors = plane.tensors(model)
        version = session.update(tensors)  # the first update writes everything
        parameters = dict(model.named_parameters())
        for name in plane.names:
            parameters[name].data = session.view(name)
        ranges = [(arena.address, arena.address + arena.size) for arena in session.arenas]
        for name in plane.names:
            address = parameters[name].data_ptr()
            placement = session.placements[name]
            block = placement.blocks[0]
            assert address == session.arenas[block.arena].address + block.arena_offset
            assert any(start <= address < end for start, end in ranges)
        plane.assert_holds(model, version)
        before = oracle.scores(plane.service)
        for step in range(5):
            with session.begin() as update:
                oracle.perturb(model, 10 + step)  # in place: the parameters are the engine's memory
                session.version = update.commit()
            assert session.version == version + step + 1
        assert oracle.difference(before, oracle.scores(plane.service)) > OTHER
        plane.assert_holds(model, version + 5)
        assert plane.digest() == session.digest(plane.tensors(model)), "not even a copy of the bytes differs"


@pytest.mark.parametrize("transport", [raw.SHARED, raw.STREAM], ids=["written", "streamed"])
def test_float32_weights_are_cast_on_the_way(plane: Plane, transport: int) -> None:
    model = plane.model(torch.float32, seed=2)
    tensors = plane.tensors(model)
    before = oracle.scores(plane.service)
    with raw.Session(plane.stub, tensors, transport) as session:
        version = session.version
        if session.shared:
            session.attach()
            assert not any(p.aliasable for p in session.answer.shared.placements)
            assert "float32" in session.answer.shared.placements[0].reason
        assert session.update(tensors) == version + 1
        plane.assert_holds(model, version + 1)
        assert oracle.difference(before, oracle.scores(plane.service)) > OTHER
        assert plane.digest() == session.digest(tensors), "the engine's bits are not torch's own cast"
        if session.shared:
            for name, placement in session.placements.items():
                held = placement.gather(session.arenas)
                assert raw.all_equal([held], [tensors[name].to(torch.bfloat16)]), name


def test_each_transport_brings_the_same_bits(plane: Plane) -> None:
    model = plane.model(torch.float32, seed=3)
    tensors = plane.tensors(model)
    found = {}
    for transport in (raw.SHARED, raw.STREAM):
        raw.restore(plane.stub)
        with raw.Session(plane.stub, tensors, transport) as session:
            if session.shared:
                session.attach()
            session.update(tensors)
        found[transport] = plane.digest()
    assert found[raw.SHARED] == found[raw.STREAM]


def test_the_checkpoint_can_be_restored(plane: Plane) -> None:
    original = plane.digest()
    model = plane.model(seed=4)
    tensors = plane.tensors(model)
    with raw.Session(plane.stub, tensors, raw.STREAM) as session:
        version = session.update(tensors)
    assert plane.digest() != original
    assert raw.restore(plane.stub) == version + 1
    assert plane.digest() == original
    plane.assert_holds(plane.model(), version + 1)


def test_a_manifest_of_another_model_is_refused_tensor_by_tensor(plane: Plane) -> None:
    model = plane.model()
    tensors = plane.tensors(model)
    first, second, third, *_ = plane.names
    tensors[first] = tensors[first].to(torch.int8)
    tensors[second] = torch.zeros(7)
    del tensors[third]
    tensors["surplus"] = torch.zeros(1)
    with pytest.raises(InvalidArgument) as caught:
        raw.Session(plane.stub, tensors)
    assert caught.value.reason == Reason.MANIFEST_MISMATCH
    assert {v.field for v in caught.value.violations} == {
        f"tensors[{name}]" for name in (first, second, third, "surplus")
    }
    assert "dtype int8 cannot become the engine's bfloat16" in str(caught.value)


def test_a_version_builds_on_the_one_before(plane: Plane) -> None:
    tensors = plane.tensors(plane.model())
    with raw.Session(plane.stub, tensors, raw.STREAM) as session:
        for base in (session.version - 1, session.version + 1, 0, 2**63):
            with pytest.raises(FailedPrecondition) as caught:
                session.begin(base)
            assert caught.value.reason == Reason.BASE_VERSION_MISMATCH
            assert caught.value.metadata == {
                "base_version": str(base),
                "weight_version": str(session.version),
            }
