"""The trainer of three services of the same model is killed or stopped at each step of an update."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection

import pytest
import torch

from tests.fleets import (
    COUNT,
    STEPS,
    Fleet,
    Replicated,
    change,
    once,
    wait_until_committed,
)
from tests.forks import processes
from tests.policies import digest_of
from tests.weight_service import network
from trainer_service.client import InferenceClient
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights


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
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_train, args=(fleet.addresses, step, theirs))
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
