"""Replicas whose commit was asked for and not heard of, while the services still make it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.faults.test_commit_unheard import HANGS_S, happens, slow_to_stop
from tests.fleets import change
from tests.policies import LEASE_S, Engine, assert_same, digest_of
from tests.weight_service import WeightService, idle, network
from trainer_service import session as session_module
from trainer_service import updates
from trainer_service.client import InferenceClient
from trainer_service.replicated import ReplicatedWeights


@contextmanager
def several(
    engines_of: Sequence[Callable[[nn.Module], Any]],
) -> Iterator[tuple[list[Engine], ReplicatedWeights, nn.Module]]:
    """Services that have the first version of a policy, which then changed."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        services = [
            WeightService(f"unix://{Path(folder, str(n))}", LEASE_S, engine_of=engine_of)
            for n, engine_of in enumerate(engines_of)
        ]
        for service in services:
            service.start()
        engines = [Engine(service.address) for service in services]
        clients = [InferenceClient(service.address) for service in services]
        for engine in engines:
            engine.wait_until_serving(30)
        model = network()
        weights = ReplicatedWeights(clients, lambda: model, timeout_s=20)
        try:
            weights.sync()
            change(model)
            yield engines, weights, model
        finally:
            weights.detach()
            for closed in (*clients, *engines):
                closed.close()
            for service in services:
                service.kill()


def test_one_that_still_makes_the_last_commit_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ANSWER_TIMEOUT_S", 1.5)
    with several([slow_to_stop, idle]) as (engines, weights, model):
        weights.sync()
        assert weights.holding() == {engines[1].address}
        change(model)
        began = time.monotonic()
        weights.sync()
        assert time.monotonic() - began < 2
        assert weights.holding() == {engines[1].address}
        assert_same(engines[1], model)
        time.sleep(HANGS_S)
        change(model)
        weights.sync()
        assert weights.holding() == {engine.address for engine in engines}
        assert [engine.digest for engine in engines] == [digest_of(model)] * 2


def test_where_all_still_make_it_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than for a lease of somebody's last life."""
    monkeypatch.setattr(session_module, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(updates, "HELD_S", 0.5)
    with several([slow_to_stop, slow_to_stop]) as (engines, weights, model):
        weights.sync()

        def all_hold_it() -> bool:
            weights.catch_up()
            return len(weights.holding()) == 2

        happens(all_hold_it)
        assert [(engine.version, engine.digest) for engine in engines] == [
            (weights.weight_version, digest_of(model))
        ] * 2


def test_an_interrupt_is_an_interrupt() -> None:
    """As a notebook's cell is ended, and run again."""
    with several([slow_to_stop, idle]) as (engines, weights, model):

        def interrupt() -> None:
            happens(lambda: engines[0].paused)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            weights.sync()
        thread.join()
        time.sleep(HANGS_S)
        change(model)
        weights.sync()
        assert weights.holding() == {engine.address for engine in engines}
        assert [(engine.version, engine.digest) for engine in engines] == [
            (weights.weight_version, digest_of(model))
        ] * 2
