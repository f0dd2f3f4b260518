"""One service stands still, or the wire to it is dead, in an update: when its trainer learns of it, what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tandem.errors import FailedPrecondition, Reason, Unavailable
from tests.faults.proxy import Proxy
from tests.policies import WAYS, Engine, Policy, assert_same, engine, policy, restore, service
from tests.weight_service import WeightService, network
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.session import Session
from trainer_service.weights import PolicyWeights

__all__ = ["engine", "policy", "service"]

#: It is given up after 1.9 s; the rest is for a busy machine.
NOTICED_S = 2.0 + 2.0
STEPS: dict[str, tuple[type, str]] = {
    "beginning": (Session, "begin"),
    "moving": (PolicyWeights, "_move"),
    "committing": (Lease, "commit"),
}


def breaks(
    monkeypatch: pytest.MonkeyPatch, step: str, fault: Callable[[], None], mend: Callable[[], None]
) -> list[float]:
    """Do `fault` at a step, and mend it when the trainer has noticed. Seconds in between."""
    began: list[float] = []
    noticed: list[float] = []
    owner, name = STEPS[step]
    real, recover = getattr(owner, name), PolicyWeights._recover

    def first(*args: Any, **kwargs: Any) -> Any:
        if not began:
            fault()
            began.append(time.monotonic())
        return real(*args, **kwargs)

    def recovers(weights: PolicyWeights, *args: Any) -> None:
        noticed.append(time.monotonic() - began[0])
        mend()
        recover(weights, *args)

    monkeypatch.setattr(owner, name, first)
    monkeypatch.setattr(PolicyWeights, "_recover", recovers)
    return noticed


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_a_service_that_stands_still_is_noticed_and_gets_everything_once_it_goes_on(
    service: WeightService,
    engine: Engine,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    dtype: torch.dtype,
    step: str,
) -> None:
    model = network(dtype)
    weights = policy(model, transport, timeout_s=60.0)
    weights.sync()
    noticed = breaks(monkeypatch, step, service.freeze, service.thaw)
    with weights.update(), torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    weights.sync()
    assert noticed
    assert noticed[0] < NOTICED_S
    assert_same(engine, model)


@pytest.mark.parametrize("step", STEPS)
def test_a_wire_on_which_nothing_arrives_is_noticed(
    service: WeightService, engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, back = network(), service.address.removeprefix("unix://")
    with Proxy(f"{back}.front", back) as proxy:
        client = InferenceClient(proxy.address)
        weights = PolicyWeights(client, lambda: model, transport="stream", timeout_s=60.0)
        weights.sync()
        noticed = breaks(monkeypatch, step, proxy.swallow, proxy.carry_on)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        weights.sync()
        assert noticed
        assert noticed[0] < NOTICED_S
        assert_same(engine, model)
        weights.detach()
        client.close()


def looks_too_early(monkeypatch: pytest.MonkeyPatch, engine: Engine, commit: Callable[..., Any]) -> None:
    """A service that stood still makes the commit only after its trainer, which heard no answer, has asked it."""
    seen = [engine.get_model()]
    real, wait = Lease.commit, InferenceClient.wait_until_serving

    def unheard(lease: Lease, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(Lease, "commit", real)
        commit(lease, *args, **kwargs)
        raise Unavailable(Reason.UNREACHABLE, "its answer was lost")

    def early(client: InferenceClient, *args: Any, **kwargs: Any) -> Any:
        return seen.pop() if seen else wait(client, *args, **kwargs)

    monkeypatch.setattr(Lease, "commit", unheard)
    monkeypatch.setattr(InferenceClient, "wait_until_serving", early)


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_a_commit_that_is_made_after_the_service_was_asked_is_known_for_our_own(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch, transport: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    before = engine.version
    with monkeypatch.context() as patched:
        with weights.update(), torch.no_grad():
            looks_too_early(patched, engine, Lease.commit)
            for parameter in model.parameters():
                parameter += 1
        weights.sync()
    assert engine.version == weights.weight_version == before + 2, "the second is ours, on top of the first"
    assert_same(engine, model)


def test_a_version_of_somebody_else_is_not_taken_for_the_one_that_was_asked_for(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = policy(model, "stream")
    weights.sync()

    def others(lease: Lease, *args: Any, **kwargs: Any) -> None:
        lease.abort("it is lost", untouched=True)
        restore(engine)

    with monkeypatch.context() as patched, torch.no_grad():
        next(model.parameters()).add_(1)
        looks_too_early(patched, engine, others)
        with pytest.raises(FailedPrecondition, match="BASE_VERSION_MISMATCH"):
            weights.sync()
    assert engine.version == weights.weight_version + 1
