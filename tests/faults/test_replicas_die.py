"""One trainer and three services of the same model, real processes: any of them is killed or stopped at each step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inference_service.sessions import MAX_STREAM_SESSIONS
from tandem.errors import DataLoss, InvalidArgument, Reason, Unavailable
from tests.faults import raw
from tests.faults.proxy import Proxy
from tests.policies import Engine, digest_of
from tests.weight_service import WeightService, network
from trainer_service import pulse
from trainer_service.client import InferenceClient
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights
from trainer_service.session import Session

LEASE_S = 1.0
COUNT = 3
VICTIM = 1
#: Steps of an update, in their order, and the method of a Member or of the weights that comes next.
STEPS = {"begun": "_policy", "moving": "send", "moved": "prepare", "prepared": "commit"}


class Fleet:
    """Services, and the clients that look at them."""

    def __init__(self, folder: str, count: int = COUNT) -> None:
        self.services = [WeightService(f"unix://{folder}/{n}", LEASE_S) for n in range(count)]
        for service in self.services:
            service.start()
        self.engines = [Engine(service.address) for service in self.services]
        for engine in self.engines:
            engine.wait_until_serving(60)

    @property
    def addresses(self) -> list[str]:
        return [service.address for service in self.services]

    def states(self) -> list[tuple[str, int, int]]:
        """State, version and digest of each."""
        return [(engine.state, engine.version, engine.digest) for engine in self.engines]

    def stop(self) -> None:
        for engine in self.engines:
            engine.close()
        for service in self.services:
            service.kill()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        fleet = Fleet(folder)
        yield fleet
        fleet.stop()


Replicated = Callable[..., ReplicatedWeights]


@pytest.fixture
def replicated(fleet: Fleet) -> Iterator[Replicated]:
    """Makes the weights of a model. Their sessions are ended."""
    made: list[ReplicatedWeights] = []
    clients = [InferenceClient(address) for address in fleet.addresses]

    def make(model: nn.Module, timeout_s: float = 60.0, **how: Any) -> ReplicatedWeights:
        made.append(ReplicatedWeights(clients, lambda: model, timeout_s=timeout_s, **how))
        return made[-1]

    yield make
    for weights in made:
        weights.detach()
    for client in clients:
        client.close()


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1


def sync_until_all(fleet: Fleet, weights: ReplicatedWeights) -> None:
    """One that comes back is found to be there at one of the next syncs: its channel waits before it connects anew."""
    for _ in range(200):
        weights.sync()
        if weights.holding() == set(fleet.addresses):
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"only {weights.holding()} came back")


def once(
    monkeypatch: pytest.MonkeyPatch, weights: ReplicatedWeights, step: str, action: Callable[[], None]
) -> None:
    """Do `action` the first time that an update comes to `step`. All others wait for it there."""
    lock, done = threading.Lock(), []
    name = STEPS[step]
    owner: Any = weights if name == "_policy" else Member
    real = getattr(owner, name)

    def first(*args: Any, **kwargs: Any) -> Any:
        with lock:
            if not done:
                done.append(True)
                action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, first)


def test_every_replica_holds_the_same_bits(fleet: Fleet, replicated: Replicated) -> None:
    model = network()
    weights = replicated(model)
    for version in (2, 3):
        change(model)
        weights.sync()
        assert weights.holding() == set(fleet.addresses)
        assert fleet.states() == [("COMMITTED", version, digest_of(model))] * COUNT
        assert weights.weight_version == version
    assert weights.history[-1].stopped > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_replica_that_refuses_keeps_the_old_version_everywhere(
    fleet: Fleet, replicated: Replicated, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    model = network()
    weights = replicated(model, sparse=sparse)
    weights.sync()
    before = fleet.states()
    prepare = Member.prepare

    def refused(member: Member, digest: int) -> None:
        prepare(member, digest ^ (member.client.address == fleet.addresses[VICTIM]))

    change(model)
    with monkeypatch.context() as patched:
        patched.setattr(Member, "prepare", refused)
        with pytest.raises(DataLoss) as caught:
            weights.sync()
    assert caught.value.reason == Reason.DIGEST_MISMATCH
    assert fleet.states() == before
    assert weights.holding() == set(fleet.addresses), "all have what was committed last"
    weights.sync()
    assert weights.history[-1].changed is None
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


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


def caught_up(fleet: Fleet, weights: ReplicatedWeights) -> bool:
    """Whether all hold the version, after some looks."""
    for _ in range(100):
        weights.catch_up()
        if weights.holding() == set(fleet.addresses):
            return True
        threading.Event().wait(0.05)
    return False


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


def test_one_that_does_not_know_its_session_any_more_is_given_all_at_once(
    fleet: Fleet, replicated: Replicated
) -> None:
    """As one does that was started again since the last update."""
    model = network()
    weights = replicated(model, sparse=True)
    weights.sync()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for _ in range(MAX_STREAM_SESSIONS):
        raw.Session(fleet.engines[VICTIM].weights, tensors, raw.STREAM)
    change(model)
    weights.sync()
    assert weights.holding() == set(fleet.addresses)
    assert fleet.states() == [("COMMITTED", 3, digest_of(model))] * COUNT


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


def test_changes_alone_go_to_all_and_everything_once_one_is_new(fleet: Fleet, replicated: Replicated) -> None:
    model = network()
    weights = replicated(model, sparse=True)
    weights.sync()
    for _ in range(2):
        with torch.no_grad():
            model[0].weight[0, 0] += 1
        weights.sync()
        assert (weights.history[-1].changed, weights.holding()) == (1, set(fleet.addresses))
    victim = fleet.services[VICTIM]
    victim.kill()
    victim.start()
    fleet.engines[VICTIM].wait_until_serving(60)
    sync_until_all(fleet, weights)
    assert weights.history[-1].changed is None
    change(model)
    weights.sync()
    assert weights.history[-1].changed == sum(p.numel() for p in model.parameters())
    assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT


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


def test_replicas_that_share_memory_or_are_one(fleet: Fleet) -> None:
    client = InferenceClient(fleet.addresses[0])
    with pytest.raises(InvalidArgument, match="the memory of one engine alone"):
        ReplicatedWeights([client], network, transport="shared")
    with pytest.raises(InvalidArgument, match="are staged, not in_place"):
        ReplicatedWeights([client], network, mode="in_place")
    for clients in ([], [client, client]):
        with pytest.raises(InvalidArgument, match="each replica once"):
            ReplicatedWeights(clients, network)
    client.close()


def other_network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5, bias=False))


def test_a_replica_of_another_model_is_named(fleet: Fleet, replicated: Replicated, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        stranger = WeightService(f"unix://{folder}/s", LEASE_S, other_network)
        stranger.start()
        clients = [InferenceClient(fleet.addresses[0]), InferenceClient(stranger.address)]
        clients[1].wait_until_serving(60)
        weights = ReplicatedWeights(clients, network, timeout_s=10.0)
        with pytest.raises(InvalidArgument) as caught:
            weights.sync()
        assert caught.value.reason == Reason.MANIFEST_MISMATCH
        weights.detach()
        stranger.kill()


# The trainer dies.

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults.test_replicas_die", "tests.weight_service"])


def _train(addresses: list[str], step: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    model = network()
    weights = ReplicatedWeights([InferenceClient(address) for address in addresses], lambda: model)
    weights.sync()
    change(model)
    monkeypatch = pytest.MonkeyPatch()

    def stop() -> None:
        pipe.send(step)
        pipe.recv()

    if step == "one committed":
        commit, gate = Member.commit, threading.Lock()
        done: list[bool] = []

        def one_by_one(member: Member) -> None:
            with gate:
                if done:
                    stop()
                commit(member)
                done.append(True)

        monkeypatch.setattr(Member, "commit", one_by_one)
    else:
        once(monkeypatch, weights, step, stop)
    weights.sync()


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("step", [*STEPS, "one committed"])
def test_a_trainer_that_dies(fleet: Fleet, replicated: Replicated, step: str, how: str) -> None:
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=_train, args=(fleet.addresses, step, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), f"the trainer never came to {step}"
        ours.recv()
        first = digest_of(network())
        changed = network()
        change(changed)
        os.kill(process.pid or 0, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        # Each replica drops what was staged, prepared or not, once it has heard nothing for its lease's time.
        for engine in fleet.engines:
            wait_until_committed(engine)
        states = fleet.states()
        assert {state for state, _, _ in states} == {"COMMITTED"}
        if step == "one committed":
            assert sorted(states)[-1][1:] == (3, digest_of(changed))
            states.remove(("COMMITTED", 3, digest_of(changed)))
        assert set(states) == {("COMMITTED", 2, first)}
        # The next trainer brings all of them to one version, whichever they had.
        model = network()
        change(model)
        change(model)
        weights = replicated(model)
        weights.sync()
        assert weights.weight_version == (4 if step == "one committed" else 3)
        assert fleet.states() == [("COMMITTED", weights.weight_version, digest_of(model))] * COUNT
    finally:
        process.kill()
        process.join(10)


def wait_until_committed(engine: Engine) -> None:
    for _ in range(600):
        if engine.state == "COMMITTED":
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"it is still {engine.state}")
