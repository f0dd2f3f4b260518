"""The trainer's weights through updates that succeed, fail, and lose their service."""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tandem.engine.v1.engine_pb2 import ServingState
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, Reason, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from tests.weight_service import WeightService, network
from trainer_service import updates as updates_module
from trainer_service.client import InferenceClient
from trainer_service.heart import HEART
from trainer_service.lease import Lease
from trainer_service.session import Session
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.identity import ProcessIdentity

LEASE_S = 0.6
#: Aliased, written, streamed.
WAYS = [("shared", torch.bfloat16), ("shared", torch.float32), ("stream", torch.bfloat16)]


@pytest.fixture
def service() -> Iterator[WeightService]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        service = WeightService(f"unix://{folder}/s", LEASE_S)
        service.start()
        yield service
        service.kill()


@pytest.fixture
def engine(service: WeightService) -> Iterator[Engine]:
    engine = Engine(service.address)
    engine.wait_until_serving(30)
    yield engine
    engine.close()


class Engine(InferenceClient):
    """What the service says of its engine."""

    @property
    def version(self) -> int:
        return self._now().weight_version

    @property
    def state(self) -> str:
        """COMMITTED, WRITING, TORN, …"""
        return pb.WeightState.Name(self._now().state).removeprefix("WEIGHT_STATE_")

    @property
    def paused(self) -> bool:
        return self.get_model().state == ServingState.SERVING_STATE_PAUSED

    @property
    def digest(self) -> int:
        """Of what is in the engine's memory now."""
        return self._now(include_digest=True).digest

    def _now(self, **fields: bool) -> pb.GetWeightVersionResponse:
        return self.weights.GetWeightVersion(pb.GetWeightVersionRequest(**fields), timeout=5)


Policy = Callable[..., PolicyWeights]


@pytest.fixture
def policy(service: WeightService, engine: Engine) -> Iterator[Policy]:
    """Makes the weights of a model. Their sessions are ended."""
    client = InferenceClient(service.address)
    made: list[PolicyWeights] = []

    def make(
        model: nn.Module, transport: str | Sequence[str] = "shared", timeout_s: float = 10.0, **how: Any
    ) -> PolicyWeights:
        made.append(PolicyWeights(client, lambda: model, transport=transport, timeout_s=timeout_s, **how))
        return made[-1]

    yield make
    for weights in made:
        weights.detach()
    client.close()


class Sgd(torch.optim.SGD):
    """SGD that also does what the test wants in the middle of its step."""

    def __init__(self, model: nn.Module, during: Callable[[], None] = lambda: None) -> None:
        super().__init__(model.parameters(), lr=0.5)
        self.during = during

    def step(self, closure: None = None) -> None:
        super().step(closure)
        self.during()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def digest_of(model: nn.Module) -> int:
    values = [value.detach().to(torch.bfloat16) for _, value in sorted(model.named_parameters())]
    return combine(digest_tensors(values))


def assert_same(engine: Engine, model: nn.Module) -> None:
    """The engine holds the model's bits, committed, and serves."""
    assert (engine.state, engine.paused) == ("COMMITTED", False)
    assert engine.digest == digest_of(model)


def restore(engine: Engine) -> None:
    engine.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=5)


#: Digest of the service's checkpoint.
ZEROS = combine(
    digest_tensors([torch.zeros_like(value) for _, value in sorted(network().named_parameters())])
)


def in_engine(engine: Engine, model: nn.Module) -> bool:
    """Whether a write to the model is a write to the engine. The model is as before."""
    before, first = engine.digest, next(model.parameters())
    value = first.detach().clone()
    with torch.no_grad():
        first += 8
    changed = engine.digest != before
    with torch.no_grad():
        first.copy_(value)
    return changed


def test_aliased_steps_hold_the_lease_and_move_nothing(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()
    assert weights.aliased
    assert weights.bytes_moved == sum(p.nbytes for p in model.parameters())
    assert weights.weight_version == engine.version == 2
    assert_same(engine, model)
    assert in_engine(engine, model)

    stopped: list[tuple[bool, str]] = []
    optimizer = Sgd(model, lambda: stopped.append((engine.paused, engine.state)))
    for expected in (3, 4):
        before = [p.detach().clone() for p in model.parameters()]
        step(model, optimizer)
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert (weights.weight_version, weights.bytes_moved) == (expected, 0)
        assert_same(engine, model)
        weights.sync()  # has nothing to do
        assert engine.version == expected
    assert stopped == [(True, "WRITING")] * 2


def test_other_optimizers_take_no_lease(engine: Engine, policy: Policy) -> None:
    model, other = network(), network()
    policy(model).sync()
    step(other, Sgd(other, lambda: pytest.fail("paused") if engine.paused else None))
    assert engine.version == 2


def test_a_step_that_calls_its_base_classs_is_one_update(engine: Engine, policy: Policy) -> None:
    torch.optim.SGD(network().parameters(), lr=1.0)  # from now on torch calls hooks for both classes
    model = network()
    weights = policy(model)
    weights.sync()
    states: list[str] = []
    step(model, Sgd(model, lambda: states.append(engine.state)))
    assert states == ["WRITING"], "the lease is held until the outer step ends"
    assert (engine.version, weights.committed) == (3, 2)
    assert_same(engine, model)


@pytest.mark.parametrize(
    ("transport", "dtype"),
    [("shared", torch.float32), ("stream", torch.float32), ("stream", torch.bfloat16)],
)
def test_written_and_streamed_move_all_at_each_sync(
    engine: Engine, policy: Policy, transport: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    optimizer = Sgd(model, lambda: pytest.fail("paused") if engine.paused else None)
    for expected in (2, 3, 4):
        weights.sync()
        assert (weights.transport, weights.aliased) == (transport, False)
        assert weights.weight_version == engine.version == expected
        assert weights.bytes_moved == 2 * sum(p.numel() for p in model.parameters())
        assert_same(engine, model)
        step(model, optimizer)


def test_a_lost_lease_is_made_up_for(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()

    def fall_silent() -> None:
        HEART.remove(weights._lease)  # no heartbeats any more, as of a process that is stopped
        time.sleep(2 * LEASE_S)
        assert engine.state == "TORN"

    step(model, Sgd(model, fall_silent))
    assert_same(engine, model)
    assert weights.weight_version == engine.version == 3
    assert in_engine(engine, model), "still the same memory"
    step(model, Sgd(model))
    assert (weights.weight_version, weights.bytes_moved) == (4, 0)


def test_heartbeats_carry_a_long_step(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()
    step(model, Sgd(model, lambda: time.sleep(2.5 * LEASE_S)))
    assert weights.weight_version == 3


def test_a_step_that_raises_tears_the_engine_and_the_next_sync_heals_it(
    engine: Engine, policy: Policy
) -> None:
    model = network()
    weights = policy(model)
    weights.sync()

    def fail() -> None:
        raise ArithmeticError("overflow")

    optimizer = Sgd(model, fail)
    with pytest.raises(ArithmeticError):
        step(model, optimizer)
    assert engine.state == "WRITING", "nobody could know yet"
    weights.abandon("training raised")
    assert engine.state == "TORN"
    weights.sync()
    assert_same(engine, model)
    # Without anybody to say so, as in a notebook, the next step sees it.
    with pytest.raises(ArithmeticError):
        step(model, optimizer)
    optimizer.during = lambda: None
    step(model, optimizer)
    assert_same(engine, model)


def test_a_step_that_raised_within_an_update_leaves_no_depth_behind(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()

    def fail() -> None:
        raise ArithmeticError("overflow")

    optimizer = Sgd(model, fail)
    with weights.update():
        with pytest.raises(ArithmeticError):
            step(model, optimizer)
        optimizer.during = lambda: None
        step(model, optimizer)
    version = engine.version
    step(model, optimizer)
    assert engine.version > version, "the lease is taken as ever"
    assert_same(engine, model)


def test_writing_outside_a_step_goes_into_an_update(engine: Engine, policy: Policy) -> None:
    model, other = network(), network()
    weights = policy(model)
    weights.sync()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(3)
    with weights.update():
        assert engine.state == "WRITING"
        model.load_state_dict(other.state_dict())
        step(model, Sgd(model))  # within the same update
        with pytest.raises(FailedPrecondition, match="sync within an update"):
            weights.sync()
    assert engine.version == 3
    assert_same(engine, model)
    assert torch.equal(model[1].weight, torch.full((4, 8), 2.5, dtype=torch.bfloat16))

    with pytest.raises(KeyError), weights.update():
        raise KeyError
    assert engine.state == "TORN"
    weights.sync()
    assert_same(engine, model)


def by_masters(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has parameters of its own, and copies them into the model's when it is done."""
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]

    class Masters(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
            super().step(closure)
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.data.copy_(master.data)

    return Masters(masters, lr=0.5)


@pytest.mark.parametrize("then", ["sync", "step"])
def test_a_write_without_the_lease_is_an_error_and_the_next_sync_heals(
    engine: Engine, policy: Policy, then: str
) -> None:
    model = network()
    weights = policy(model)
    weights.sync()
    step(model, Sgd(model))
    step(model, by_masters(model))
    with pytest.raises(FailedPrecondition, match="written outside an update") as raised:
        weights.sync() if then == "sync" else step(model, Sgd(model))
    assert raised.value.reason == Reason.UPDATE_ORDER
    assert engine.state == "TORN", "what was served is of no version"
    weights.sync()
    assert_same(engine, model)
    assert engine.version == 4


def test_replaced_parameter_memory_is_moved_back(engine: Engine, policy: Policy) -> None:
    model, other = network(), network()
    weights = policy(model)
    weights.sync()
    with torch.no_grad():
        other[1].weight.fill_(2)
    model[1].weight.data = other[1].weight.data
    weights.sync()
    assert weights.bytes_moved == model[1].weight.nbytes
    assert_same(engine, model)
    assert in_engine(engine, model)


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
