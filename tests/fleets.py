"""Several services of the same model as real processes, and what a trainer of all of them meets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.policies import Engine
from tests.weight_service import WeightService
from trainer_service.member import Member
from trainer_service.replicated import ReplicatedWeights

LEASE_S = 1.0
COUNT = 3
VICTIM = 1
#: Steps of an update, in their order, and the method of a Member or of the weights that comes next.
STEPS = {"begun": "_policy", "moving": "send", "moved": "prepare", "prepared": "commit"}

Replicated = Callable[..., ReplicatedWeights]


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


def change(model: nn.Module) -> None:
    """All that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1


def sync_until_all(fleet: Fleet, weights: ReplicatedWeights) -> None:
    """One that comes back is found to be there at one of the next syncs: its channel waits before it connects anew."""
    for _ in range(200):
        weights.sync()
        if weights.holding() == set(fleet.addresses):
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"only {weights.holding()} came back")


def caught_up(fleet: Fleet, weights: ReplicatedWeights) -> bool:
    """Whether all hold the version, after some looks."""
    for _ in range(100):
        weights.catch_up()
        if weights.holding() == set(fleet.addresses):
            return True
        threading.Event().wait(0.05)
    return False


def wait_until_committed(engine: Engine) -> None:
    for _ in range(600):
        if engine.state == "COMMITTED":
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"it is still {engine.state}")


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
