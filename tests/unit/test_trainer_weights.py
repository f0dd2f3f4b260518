"""The trainer's weights through updates: what holds the lease, what moves, and what is written without it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tests.policies import (
    LEASE_S,
    WAYS,
    Engine,
    Policy,
    Sgd,
    assert_same,
    engine,
    in_engine,
    policy,
    service,
    step,
)
from tests.weight_service import network
from trainer_service.heart import HEART

__all__ = ["engine", "policy", "service"]  # fixtures


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


@pytest.mark.parametrize("then", ["the update ends", "sync", "another update"])
def test_who_goes_on_after_a_step_that_raised_holds_no_lease(
    engine: Engine, policy: Policy, then: str
) -> None:
    model = network()
    weights = policy(model)
    weights.sync()

    def fail() -> None:
        raise ArithmeticError("overflow")

    with weights.update() if then == "the update ends" else nullcontext():
        with pytest.raises(ArithmeticError):
            step(model, Sgd(model, fail))
    if then == "the update ends":
        assert engine.state == "TORN"
    if then == "another update":
        with weights.update(), torch.no_grad():
            next(model.parameters()).fill_(3)
    else:
        weights.sync()
    assert_same(engine, model)


def test_another_thread_takes_no_step_for_one_that_raised(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()

    def elsewhere() -> None:
        with ThreadPoolExecutor(1) as thread:
            with pytest.raises(FailedPrecondition, match="sync within an update"):
                thread.submit(weights.sync).result()

    step(model, Sgd(model, elsewhere))
    assert (weights.weight_version, weights.bytes_moved) == (3, 0)
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


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
@pytest.mark.parametrize("other", [nn.Identity(), nn.Linear(8, 5, bias=False)], ids=["none", "larger"])
def test_a_tensor_that_is_not_there_any_more_is_named_and_nothing_changes(
    engine: Engine, policy: Policy, transport: str, dtype: torch.dtype, other: nn.Module
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    kept, model[1] = model[1], other
    with pytest.raises(InvalidArgument, match=r"1\.weight: ") as raised:
        weights.sync()
    assert [v.field for v in raised.value.violations] == ["tensors[1.weight]"]
    assert (engine.version, engine.state, engine.paused) == (2, "COMMITTED", False)
    model[1] = kept
    step(model, Sgd(model))
    weights.sync()
    assert_same(engine, model)


def test_one_that_is_lost_in_an_update_leaves_no_lease(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = policy(model)
    weights.sync()
    kept = model[1]
    with pytest.raises(InvalidArgument, match="missing"), weights.update():
        model[1] = nn.Identity()
    assert (engine.version, engine.state) == (2, "TORN")
    model[1] = kept
    weights.sync()
    assert_same(engine, model)
