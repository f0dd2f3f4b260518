"""One trainer and three services of the same model, real processes: one of them is killed or stopped at each step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tandem.errors import Unavailable
from tests.faults.proxy import Proxy
from tests.fleets import (
    COUNT,
    STEPS,
    VICTIM,
    Fleet,
    Replicated,
    caught_up,
    change,
    once,
    sync_until_all,
    wait_until_committed,
)
from tests.policies import digest_of, restore
from tests.weight_service import WeightService, network
from trainer_service import pulse
from trainer_service import replicated as replicated_module
from trainer_service.client import InferenceClient
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights
from trainer_service.session import Session

#: One that stands still is given up after 1.8 s; the rest is for a busy machine.
NOTICED_S = 2.0 + 2.0


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("step", STEPS)
def test_a_replica_that_dies_is_dropped_and_catches_up(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch, step: str, how: str
) -> None:
    model = network()
    weights = replicated(model)
    weights.sync()
    change(model)
    victim = fleet.services[VICTIM]
    with monkeypatch.context() as patched:
        once(patched, weights, step, getattr(victim, how))
        weights.sync()
    rest = [address for address in fleet.addresses if address != victim.address]
    assert weights.holding() == set(rest)
    for engine in (fleet.engines[n] for n in range(COUNT) if n != VICTIM):
        assert (engine.state, engine.version, engine.digest) == ("COMMITTED", 3, digest_of(model))
    if how == "kill":
        victim.start()
    else:
        victim.thaw()
    fleet.engines[VICTIM].wait_until_serving(60)
    assert fleet.engines[VICTIM].state in ("COMMITTED", "STAGING"), "whatever it was given is dropped"
    change(model)
    sync_until_all(fleet, weights)
    assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT


def test_a_dead_replica_is_noticed_within_two_seconds() -> None:
    assert pulse.LOOK_S + pulse.LOOK_S / 4 + pulse.ANSWER_S < 2


def test_one_that_comes_back_is_given_the_version_that_the_others_have(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = replicated(model)
    weights.sync()
    victim = fleet.services[VICTIM]
    victim.kill()
    change(model)
    weights.sync()
    weights.catch_up()
    assert len(weights.holding()) == COUNT - 1, "nobody waits for one that is not there"
    victim.start()
    fleet.engines[VICTIM].wait_until_serving(60)
    assert caught_up(fleet, weights)
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT
    assert weights.weight_version == 3


def test_one_whose_commit_was_not_heard_of_is_believed_by_its_digest(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = replicated(model)
    weights.sync()
    commit = Member.commit

    def unheard(member: Member) -> None:
        commit(member)
        if member.client.address == fleet.addresses[VICTIM]:
            member.drop("its answer was lost")

    change(model)
    with monkeypatch.context() as patched:
        patched.setattr(Member, "commit", unheard)
        weights.sync()
    assert len(weights.holding()) == COUNT - 1
    assert caught_up(fleet, weights)
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


def test_one_whose_commit_is_made_after_it_was_introduced_anew_is_introduced_once_more(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still: the commit that was given up was waiting for it."""
    model = network()
    weights = replicated(model)
    weights.sync()
    join, victim = Member.join, fleet.engines[VICTIM]

    def commits_late(member: Member) -> None:
        join(member)
        if member.client.address == victim.address:
            monkeypatch.setattr(Member, "join", join)
            restore(victim)

    monkeypatch.setattr(Member, "join", commits_late)
    weights.drop(weights._roster.members[VICTIM].client, "it stands still")
    change(model)
    sync_until_all(fleet, weights)
    assert Member.join is join, "it was introduced as said"
    assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT


def test_one_that_comes_back_when_the_policy_has_moved_on_waits_for_the_next_sync(
    fleet: Fleet, replicated: Replicated
) -> None:
    model = network()
    weights = replicated(model)
    weights.sync()
    victim = fleet.services[VICTIM]
    victim.kill()
    change(model)
    weights.sync()
    victim.start()
    fleet.engines[VICTIM].wait_until_serving(60)
    change(model)  # the next step, which is not committed
    checkpoint = fleet.engines[VICTIM].digest
    for _ in range(5):
        weights.catch_up()
        threading.Event().wait(0.05)
    assert len(weights.holding()) == COUNT - 1
    assert (fleet.engines[VICTIM].version, fleet.engines[VICTIM].digest) == (1, checkpoint)
    sync_until_all(fleet, weights)
    assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT


def test_one_that_is_dropped_while_its_lease_comes_does_not_keep_it(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease whose heart went on beating would keep every later update away from it."""
    model = network()
    weights = replicated(model)
    weights.sync()
    (victim,) = [
        member for member in weights._roster.members if member.client.address == fleet.addresses[VICTIM]
    ]
    begin = Session.begin

    def dropped(session: Session, *args: Any, **kwargs: Any) -> Any:
        lease = begin(session, *args, **kwargs)
        if session is victim.session:
            victim.drop("it was slow")
        return lease

    with monkeypatch.context() as patched:
        patched.setattr(Session, "begin", dropped)
        weights.sync()
    assert len(weights.holding()) == COUNT - 1
    wait_until_committed(fleet.engines[VICTIM])
    sync_until_all(fleet, weights)


@pytest.mark.parametrize("how", ["cut", "swallow", "slow"])
def test_a_wire_to_one_replica(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Cut or dead, its replica is dropped, and drops what it was given; slow, all wait for it."""
    victim, model = fleet.services[VICTIM], network()
    back = victim.address.removeprefix("unix://")
    with Proxy(f"{back}.front", back, delay_s=0.01 if how == "slow" else 0.0) as proxy:
        addresses = [a if a != victim.address else proxy.address for a in fleet.addresses]
        clients = [InferenceClient(address) for address in addresses]
        weights = ReplicatedWeights(clients, lambda: model, timeout_s=60.0)
        weights.sync()
        assert weights.holding() == set(addresses)
        before = fleet.engines[VICTIM].digest
        change(model)
        with monkeypatch.context() as patched:
            if how != "slow":
                once(patched, weights, "moved", getattr(proxy, how))
            weights.sync()
        if how == "slow":
            assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT
        else:
            assert weights.holding() == set(addresses) - {proxy.address}
            wait_until_committed(fleet.engines[VICTIM])
            assert (fleet.engines[VICTIM].version, fleet.engines[VICTIM].digest) == (2, before)
        weights.detach()
        for client in clients:
            client.close()


def test_whose_death_others_notice_is_not_counted_on(fleet: Fleet, replicated: Replicated) -> None:
    weights = replicated(network())
    weights.sync()
    (lost,) = [client for client in weights.current if client.address == fleet.addresses[VICTIM]]
    weights.drop(lost, "it gives no rollouts")
    assert weights.holding() == {a for a in fleet.addresses if a != lost.address}
    sync_until_all(fleet, weights)


def test_without_any_replica_it_waits_and_then_says_so(fleet: Fleet, replicated: Replicated) -> None:
    weights = replicated(network(), timeout_s=0.5)
    weights.sync()
    for service in fleet.services:
        service.kill()
    with pytest.raises(Unavailable) as caught:
        weights.sync()
    assert weights.holding() == set()
    assert all(address in caught.value.message for address in fleet.addresses)
    patient = replicated(network(), timeout_s=60.0)
    timer = threading.Timer(0.3, fleet.services[0].start)
    timer.start()
    patient.sync()
    timer.join()
    assert patient.holding() == {fleet.addresses[0]}


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("call", ["GetManifest", "OpenSession"])
def test_one_that_dies_while_it_is_introduced_holds_nobody_up(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch, call: str, how: str
) -> None:
    weights, victim = replicated(network()), fleet.services[VICTIM]
    weights.sync()
    victim.kill()
    weights.sync()
    victim.start()
    fleet.engines[VICTIM].wait_until_serving(60)
    died = dies_before(monkeypatch, call, victim, how)
    assert_dropped(fleet, weights, weights.sync, died)


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_one_that_dies_while_it_is_asked_what_it_holds_stays_out(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    weights, victim = replicated(network()), fleet.services[VICTIM]
    weights.sync()
    (lost,) = [client for client in weights.current if client.address == victim.address]
    weights.drop(lost, "it gives no rollouts")
    died: list[float] = []
    holds = Session.holds

    def dies(session: Session, *args: Any) -> bool:
        getattr(victim, how)()
        died.append(time.monotonic())
        return holds(session, *args)

    monkeypatch.setattr(Session, "holds", dies)
    assert_dropped(fleet, weights, weights.catch_up, died)


def assert_dropped(
    fleet: Fleet, weights: ReplicatedWeights, call: Callable[[], None], died: list[float]
) -> None:
    """`call` goes on in time, without the victim, when it is the one in which that died."""
    for _ in range(200):
        call()
        if died:
            break
        threading.Event().wait(0.05)
    assert time.monotonic() - died[0] < NOTICED_S
    assert weights.holding() == set(fleet.addresses) - {fleet.services[VICTIM].address}


def dies_before(monkeypatch: pytest.MonkeyPatch, call: str, victim: WeightService, how: str) -> list[float]:
    """Have a service die right before it is asked for this. When it did."""
    died: list[float] = []
    real = replicated_module.watched

    def watched(client: InferenceClient, method: Any, *args: Any) -> Any:
        if client.address == victim.address and call in str(method._method) and not died:
            getattr(victim, how)()
            died.append(time.monotonic())
        return real(client, method, *args)

    monkeypatch.setattr(replicated_module, "watched", watched)
    return died
