"""A commit was asked for, and the trainer does not hear what became of it: it finds out, and the run goes on.

Nothing is anybody else's that is its own, no number is of two policies, and whoever is late holds up nobody.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from inference_service.staging import Staging
from tandem.errors import Reason, Unavailable
from tests.faults.proxy import Proxy
from tests.fleets import change
from tests.integration.calls import until
from tests.policies import LEASE_S, WAYS, Engine, Policy, assert_same, engine, policy, service
from tests.weight_service import WeightService, idle, network, stopping_late
from trainer_service import updates
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.session import Session
from trainer_service.weights import PolicyWeights

__all__ = ["engine", "policy", "service"]  # fixtures

SLOW_S = 1.0
HANGS_S = 4.0


def slow_to_give_back(model: nn.Module) -> Any:
    """Its updates stay STAGING for a while when they are committed."""
    forget = Staging.forget

    def forgets(self: Staging) -> None:
        time.sleep(SLOW_S)
        forget(self)

    Staging.forget = forgets  # type: ignore[method-assign]  # in the service's process alone
    return idle(model)


def slow_to_go_on(model: nn.Module) -> Any:
    """They stay WRITING."""
    engine, arenas = idle(model)
    release = engine.release

    async def releases(who: str) -> None:
        await asyncio.sleep(SLOW_S)
        await release(who)

    engine.release = releases  # type: ignore[method-assign]
    return engine, arenas


def slow_to_stop(model: nn.Module) -> Any:
    """The second commit stands before a long step of generation."""
    return stopping_late(model, 2, HANGS_S)


def slow_to_go_on_with_adapters(model: nn.Module) -> Any:
    from inference_service.loras import Loras

    engine, arenas = slow_to_go_on(model)
    engine.vllm_config = SimpleNamespace(
        lora_config=SimpleNamespace(lora_dtype=torch.bfloat16, max_lora_rank=8)
    )
    engine.loras = Loras(engine)
    return engine, arenas


@contextmanager
def far(
    engine_of: Callable[[nn.Module], Any], model: nn.Module | None = None, **how: Any
) -> Iterator[tuple[Engine, Proxy, PolicyWeights, nn.Module]]:
    """A service, and a trainer at the other end of a wire, whose first update is made."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        service = WeightService(f"unix://{folder}/s", LEASE_S, engine_of=engine_of)
        service.start()
        try:
            with closing(Engine(service.address)) as engine, Proxy(f"{folder}/f", f"{folder}/s") as wire:
                engine.wait_until_serving(30)
                model = model or network()
                with closing(InferenceClient(wire.address)) as client:
                    weights = PolicyWeights(client, lambda: model, transport="stream", timeout_s=30.0, **how)
                    weights.sync()
                    change(model)
                    yield engine, wire, weights, model
                    weights.detach()
        finally:
            service.kill()


def happens(what: Callable[[], bool]) -> None:
    until(what, 10, "it does not happen")


def in_the_first_commit(patch: pytest.MonkeyPatch, beside: Callable[[], None]) -> list[threading.Thread]:
    """Have something done in another thread, once, while a commit is waited for."""
    commit, begun = Lease.commit, []

    def commits(lease: Lease, *args: Any, **named: Any) -> Any:
        if not begun:
            begun.append(threading.Thread(target=beside))
            begun[0].start()
        return commit(lease, *args, **named)

    patch.setattr(Lease, "commit", commits)
    return begun


def cut_in_the_middle(patch: pytest.MonkeyPatch, engine: Engine, wire: Proxy, weights: PolicyWeights) -> str:
    """An update whose wire is cut once its version is there, and it is not at its end. Its state then."""
    before, seen = engine.version, []

    def cut() -> None:
        happens(lambda: engine.version != before)
        seen.append(engine.state)
        wire.cut()

    threads = in_the_first_commit(patch, cut)
    weights.sync()
    threads[0].join()
    return seen[0]


@pytest.mark.parametrize("engine_of", [slow_to_give_back, slow_to_go_on])
def test_a_wire_that_is_cut_between_the_commit_and_its_end(
    monkeypatch: pytest.MonkeyPatch, engine_of: Callable[[nn.Module], Any]
) -> None:
    """The version is the new one, and the update still there: it is our own all the same."""
    with far(engine_of, mode="staged") as (engine, wire, weights, model):
        state = cut_in_the_middle(monkeypatch, engine, wire, weights)
        assert state == ("STAGING" if engine_of is slow_to_give_back else "WRITING")
        assert engine.version == weights.weight_version
        assert_same(engine, model)


def test_a_wire_that_is_cut_before_an_adapters_update_has_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is told also while the update still has the weights."""
    base = network()
    with torch.no_grad():
        for parameter in base.parameters():  # as the engine's are
            parameter.zero_()
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    with far(slow_to_go_on_with_adapters, model, adapter="a") as (engine, wire, weights, _):
        before = engine.version
        assert cut_in_the_middle(monkeypatch, engine, wire, weights) == "WRITING"
        assert engine.version == weights.weight_version == before + 2


def test_a_commit_that_takes_longer_than_a_lease_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "HELD_S", 0.5)
    with far(slow_to_stop, mode="staged") as (engine, wire, weights, model):
        before, begin, begun = engine.version, Session.begin, []

        def cut() -> None:
            happens(lambda: engine.paused)
            wire.cut()

        def begins(session: Session, *args: Any, **named: Any) -> Lease:
            begun.append(args)
            return begin(session, *args, **named)

        threads = in_the_first_commit(monkeypatch, cut)
        monkeypatch.setattr(Session, "begin", begins)
        weights.sync()
        threads[0].join()
        assert len(begun) > 3, "the lease was waited for, more than once"
        assert engine.version == before + 2, "and the commit made that was under way"
        assert engine.version == weights.weight_version
        assert_same(engine, model)


def unheard(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The next commit is made, and its answer lost."""
    commit = Lease.commit

    def commits(lease: Lease, *args: Any, **named: Any) -> Any:
        patch.setattr(Lease, "commit", commit)
        commit(lease, *args, **named)
        lease._end()
        raise error

    patch.setattr(Lease, "commit", commits)


LOST = Unavailable(Reason.UNREACHABLE, "its answer was lost")


def test_a_question_that_fails_is_asked_again(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = policy(model, "stream")
    weights.sync()
    change(model)
    unheard(monkeypatch, LOST)
    holds, asked = Session.holds, []

    def fails_once(session: Session, *args: Any) -> bool:
        asked.append(args)
        if len(asked) == 1:
            raise LOST
        return holds(session, *args)

    monkeypatch.setattr(Session, "holds", fails_once)
    weights.sync()
    assert len(asked) == 2
    assert_same(engine, model)


def test_a_service_that_stands_still_when_it_is_asked_is_noticed(
    service: WeightService, engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = policy(model, "stream", timeout_s=60)
    weights.sync()
    change(model)
    unheard(monkeypatch, LOST)
    holds, took = Session.holds, []

    def stands_still(session: Session, *args: Any) -> bool:
        if took:
            return holds(session, *args)
        service.freeze()
        threading.Timer(6, service.thaw).start()
        began = time.monotonic()
        try:
            return holds(session, *args)
        finally:
            took.append(time.monotonic() - began)

    monkeypatch.setattr(Session, "holds", stands_still)
    weights.sync()
    assert took[0] < 4, "and not when its deadline is over"
    assert_same(engine, model)


@pytest.mark.parametrize(("transport", "dtype"), WAYS)
def test_a_commit_of_which_nothing_was_heard_is_known_after_further_steps(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch, transport: str, dtype: torch.dtype
) -> None:
    """The policy is another by then; what was asked for is not forgotten with the sync that failed."""
    model = network(dtype)
    weights = policy(model, transport)
    weights.sync()
    before = engine.version
    with pytest.raises(Unavailable, match="nobody answers"):
        step_and_lose(model, weights, monkeypatch)
    assert engine.version == before + 1
    if not weights.aliased:  # else it needs the lease, which is another update
        change(model)
    weights.sync()
    assert engine.version == weights.weight_version == before + 2
    assert_same(engine, model)


def step_and_lose(model: nn.Module, weights: PolicyWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is made, and whose service is not seen any more."""
    with monkeypatch.context() as patch:
        unheard(patch, LOST)
        patch.setattr(InferenceClient, "wait_until_serving", _gone)
        with weights.update():
            change(model)
        weights.sync()


def test_a_commit_that_overtakes_the_last_attempt_is_known_for_our_own(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = policy(model, "stream")
    weights.sync()
    change(model)
    commit, begin, late, begun = Lease.commit, Session.begin, [], []

    def commits(lease: Lease, *args: Any, **named: Any) -> Any:
        if not late:
            late.append((lease, args[0]))
            raise LOST
        return commit(lease, *args, **named)

    def begins(session: Session, *args: Any, **named: Any) -> Lease:
        begun.append(args)
        if len(begun) == 2:
            raise LOST
        if len(begun) == updates.ATTEMPTS:
            commit(*late[0])
        return begin(session, *args, **named)

    monkeypatch.setattr(Lease, "commit", commits)
    monkeypatch.setattr(Session, "begin", begins)
    weights.sync()
    assert len(begun) > updates.ATTEMPTS
    assert_same(engine, model)


def test_a_commit_that_was_interrupted_is_known_for_our_own(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook's cell is, and then run again."""
    model = network()
    weights = policy(model, "stream")
    weights.sync()
    change(model)
    unheard(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        weights.sync()
    weights.sync()
    assert engine.version == weights.weight_version
    assert_same(engine, model)


def test_two_policies_never_have_one_number(
    service: WeightService, engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the first life of the engine, which had the one, ended before the trainer heard of it."""
    model = network()
    weights = policy(model, "stream", timeout_s=30)
    weights.sync()
    with pytest.raises(Unavailable, match="nobody answers"):
        step_and_lose(model, weights, monkeypatch)
    first = engine.version, engine.digest
    service.kill()
    service.start()
    engine.wait_until_serving(30)
    change(model)
    weights.sync()
    assert_same(engine, model)
    assert engine.digest != first[1]
    assert engine.version > first[0]


def test_nor_after_one_of_them_was_known_for_our_own(
    service: WeightService, engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = policy(model, "stream")
    weights.sync()
    change(model)
    begin, begun, first = Session.begin, [], []

    def begins(session: Session, *args: Any, **named: Any) -> Lease:
        begun.append(args)
        if len(begun) == 2:  # its own commit was recognized
            first.append((engine.version, engine.digest))
            service.kill()
        return begin(session, *args, **named)

    with monkeypatch.context() as patch:
        unheard(patch, LOST)
        patch.setattr(Session, "begin", begins)
        with pytest.raises(Unavailable):
            weights.sync()
    service.start()
    engine.wait_until_serving(30)
    change(model)
    weights.sync()
    assert_same(engine, model)
    assert engine.digest != first[0][1]
    assert engine.version > first[0][0]


def _gone(*_: Any, **__: Any) -> None:
    raise Unavailable(Reason.UNREACHABLE, "nobody answers")
