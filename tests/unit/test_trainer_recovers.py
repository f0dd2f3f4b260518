"""The trainer's weights where the service goes away, where an answer is lost, and where somebody else writes too."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, Reason, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from tests.policies import (
    WAYS,
    ZEROS,
    Engine,
    Policy,
    Sgd,
    assert_same,
    engine,
    policy,
    restore,
    service,
    step,
)
from tests.weight_service import WeightService, network
from trainer_service import updates as updates_module
from trainer_service.generation import RemoteGeneration
from trainer_service.lease import Lease
from trainer_service.session import Session
from trainer_service.weights import PolicyWeights
from weight_transfer.identity import ProcessIdentity

__all__ = ["engine", "policy", "service"]  # fixtures


@pytest.mark.parametrize("transport", ["shared", "stream"])
@pytest.mark.parametrize("when", ["between", "during"])
def test_a_service_that_comes_back_gets_everything_anew(
    service: WeightService, engine: Engine, policy: Policy, transport: str, when: str
) -> None:
    model = network()
    weights = policy(model, transport)
    weights.sync()
    before, life = [p.detach().clone() for p in model.parameters()], weights.engine_id

    def restart() -> None:
        service.kill()
        threading.Timer(0.5, service.start).start()

    optimizer = Sgd(model, restart if when == "during" else lambda: None)
    if when == "between":
        restart()
    step(model, optimizer)
    weights.sync()
    assert weights.engine_id != life
    assert weights.weight_version == engine.version == 3
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value - 0.5)
    assert_same(engine, model)
    optimizer.during = lambda: None
    step(model, optimizer)
    weights.sync()
    assert_same(engine, model)
    assert weights.aliased == (transport == "shared")


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_versions_go_on_and_the_same_weights_keep_theirs_in_a_new_life_of_the_engine(
    service: WeightService, engine: Engine, policy: Policy, transport: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    optimizer = Sgd(model)
    weights.sync()
    for _ in range(3):
        step(model, optimizer)
        weights.sync()
    assert weights.weight_version == engine.version == 5

    for _ in range(2):  # lives
        service.kill()
        service.start()
        weights.sync()
        assert weights.weight_version == engine.version == 5, "other ranks wait for rollouts of it"
        assert_same(engine, model)
    service.kill()
    service.start()
    step(model, optimizer)
    weights.sync()
    assert weights.weight_version == engine.version == 6
    assert_same(engine, model)


def test_an_engine_that_was_torn_while_it_slept_serves_the_next_trainer(
    engine: Engine, policy: Policy
) -> None:
    """As by a trainer with sleep mode that dies in its optimizer's step. The next one is without."""
    first, second = network(), network()
    dying = policy(first)
    dying.sync()
    engine.sleep()
    with pytest.raises(KeyError), dying.update():
        raise KeyError
    dying.detach()
    assert engine.get_model().state == ServingState.SERVING_STATE_TORN
    weights = policy(second)
    generation = RemoteGeneration(None, Accelerator(cpu=True), None, client=engine, weights=weights)
    generation.sync_weights()
    assert engine.get_model().state == ServingState.SERVING_STATE_SERVING
    assert_same(engine, second)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_a_service_that_stays_away_is_an_error_in_time(
    service: WeightService, policy: Policy, transport: str
) -> None:
    model = network()
    weights = policy(model, transport, timeout_s=1.0)
    weights.sync()
    values = [p.detach().clone() for p in model.parameters()]
    service.kill()
    started = time.monotonic()
    with pytest.raises(Unavailable, match="is not serving after"):
        weights.sync()
    assert time.monotonic() - started < 6
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))


def unleased_moves(monkeypatch: pytest.MonkeyPatch, weights: PolicyWeights) -> list[str]:
    """States in which the engine's memory was written to, other than WRITING."""
    transport, found = weights._session.transport, []
    move = transport.move

    def watched(*args: Any, **kwargs: Any) -> Any:
        state = pb.WeightState.Name(
            weights._client.weights.GetWeightVersion(pb.GetWeightVersionRequest()).state
        )
        if state not in ("WEIGHT_STATE_WRITING", "WEIGHT_STATE_STAGING"):
            found.append(state)
        return move(*args, **kwargs)

    monkeypatch.setattr(transport, "move", watched)
    return found


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_a_commit_whose_answer_is_lost_is_known_by_its_digest(
    engine: Engine,
    policy: Policy,
    transport: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    unleased = unleased_moves(monkeypatch, weights)
    commit, held, asked = Lease.commit, [], []
    holds = weights._session.holds

    def lose_answer(lease: Lease, digest: int | None, **more: Any) -> tuple[int, float]:
        commit(lease, digest, **more)
        held.append(engine.digest)
        monkeypatch.setattr(Lease, "commit", commit)
        raise Unavailable(Reason.UNREACHABLE, "connection reset")

    def ask(number: int, digest: int) -> bool:
        asked.append((number, digest, holds(number, digest), holds(number, digest ^ 1)))
        return asked[-1][2]

    monkeypatch.setattr(Lease, "commit", lose_answer)
    monkeypatch.setattr(weights._session, "holds", ask)
    step(model, Sgd(model))
    weights.sync()
    assert asked == [(3, held[0], True, False)]
    assert unleased == []
    assert_same(engine, model)
    assert weights.weight_version == engine.version == 4


@pytest.mark.parametrize(("transport", "dtype"), WAYS[1:])
def test_somebody_elses_commit_is_not_taken_for_one_whose_answer_was_lost(
    engine: Engine,
    policy: Policy,
    transport: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()

    def lose(lease: Lease, digest: int | None, **more: Any) -> tuple[int, float]:
        lease.abort("lost", untouched=False)
        restore(engine)
        raise Unavailable(Reason.UNREACHABLE, "connection reset")

    monkeypatch.setattr(Lease, "commit", lose)
    step(model, Sgd(model))
    with pytest.raises(FailedPrecondition) as raised:
        weights.sync()
    assert raised.value.reason == Reason.BASE_VERSION_MISMATCH
    assert (engine.version, engine.digest) == (3, ZEROS)


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_an_engine_that_somebody_else_updated_is_not_written_to(
    engine: Engine,
    policy: Policy,
    transport: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    begin = Session.begin

    def unavailable(*args: Any, **kwargs: Any) -> Lease:
        monkeypatch.setattr(Session, "begin", begin)
        restore(engine)
        raise Unavailable(Reason.UNREACHABLE, "connection reset")

    monkeypatch.setattr(Session, "begin", unavailable)

    def update() -> None:
        step(model, Sgd(model))  # begins by itself where parameters are aliased
        weights.sync()

    with pytest.raises(FailedPrecondition) as raised:
        update()
    assert raised.value.reason == Reason.BASE_VERSION_MISMATCH
    assert (engine.version, engine.digest) == (3, ZEROS)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_weights_that_somebody_else_made_are_an_error(engine: Engine, policy: Policy, transport: str) -> None:
    model = network()
    weights = policy(model, transport)
    weights.sync()
    restore(engine)
    with pytest.raises(FailedPrecondition) as raised:
        weights.sync()
    assert raised.value.reason == Reason.BASE_VERSION_MISMATCH


def test_the_first_transport_that_can_be_had_is_taken(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = policy(network(), ("shared", "stream")), policy(network(), ("shared", "stream"))
    first.open()
    assert first.transport == "shared"
    first.detach()
    monkeypatch.setattr(ProcessIdentity, "current", lambda gpus: ProcessIdentity("another host", 1, 1, 1))
    second.open()
    assert second.transport == "stream"


def test_a_second_trainer_is_told_that_the_first_has_the_engine(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates_module, "HELD_S", 0.3)
    first, second = policy(network()), policy(network())
    first.sync()
    with pytest.raises(Aborted, match="another trainer"):
        second.sync()
    first.detach()
    second.sync()
    assert second.aliased


def test_another_model_is_refused_with_every_difference(policy: Policy) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=True)).to(torch.bfloat16)
    with pytest.raises(InvalidArgument) as raised:
        policy(model).sync()
    assert raised.value.reason == Reason.MANIFEST_MISMATCH
    assert {v.field for v in raised.value.violations} == {"tensors[1.weight]", "tensors[1.bias]"}


def test_reading_that_fails_leaves_the_engine_as_it_was(engine: Engine, policy: Policy) -> None:
    model = network(torch.float32)
    weights = policy(model)
    weights.sync()
    held = engine.digest
    source = weights._policy([])[0]
    object.__setattr__(source, "read", lambda: (_ for _ in ()).throw(MemoryError("no room")))
    weights._policy = lambda wanted: [source]  # type: ignore[method-assign,assignment]
    with pytest.raises(MemoryError):
        weights.sync()
    assert engine.state == "COMMITTED"
    assert engine.version == 2
    assert engine.digest == held


@pytest.mark.parametrize("how", ["detach", "forgotten"])
def test_the_model_outlives_its_session(engine: Engine, how: str) -> None:
    model = network()
    weights = PolicyWeights(engine, lambda: model, transport="shared")
    weights.sync()
    values, held = [p.detach().clone() for p in model.parameters()], engine.digest
    if how == "detach":
        weights.detach()
    del weights
    gc.collect()
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    step(model, Sgd(model))
    assert engine.digest == held
    # Another trainer can have the engine.
    other = PolicyWeights(engine, lambda: network(), transport="shared")
    other.sync()
    other.detach()
