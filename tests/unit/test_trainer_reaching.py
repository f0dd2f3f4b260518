"""From addresses to one service or several, and how the policy is held again where engines went away."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tandem.errors import InvalidArgument
from trainer_service.client import InferenceClient
from trainer_service.reaching import reached, restore, weights_of
from trainer_service.replicas import Replicas
from trainer_service.replicated import ReplicatedWeights
from trainer_service.weights import PolicyWeights

A, B = "unix:///tmp/a", "unix:///tmp/b"


@pytest.mark.parametrize("given", [A, [A], (A,), f" {A} "])
def test_one_address_is_one_service(given: Any) -> None:
    client = reached("NONE", "inference_address", given, None, "colocate")
    assert isinstance(client, InferenceClient)
    assert client.address == A
    assert isinstance(weights_of(client, lambda: nn.Linear(1, 1), transport=("shared",)), PolicyWeights)
    client.close()


@pytest.mark.parametrize("given", [[A, B], f"{A},{B}", f"{A}, {B}"])
def test_several_are_replicas(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = reached("NONE", "inference_address", given, None)
    assert isinstance(replicas, Replicas)
    assert [client.address for client in replicas.clients] == [A, B]
    monkeypatch.setenv("SOME_ADDRESS", f"{A},{B}")
    again = reached("SOME", "inference_address", None, None)
    assert isinstance(again, Replicas)
    for made in (replicas, again):
        made.close()


def test_those_that_hold_the_weights_are_asked() -> None:
    replicas = reached("NONE", "inference_address", [A, B], None)
    assert isinstance(replicas, Replicas)
    weights = weights_of(replicas, lambda: nn.Linear(1, 1), transport=("stream",))
    assert isinstance(weights, ReplicatedWeights)
    assert replicas.holding() is None, "before the first version all do"
    assert [r.client.address for r in replicas.usable()] == [A, B]
    weights.history.append(Stats())  # type: ignore[arg-type]
    weights._roster._current = frozenset(replicas.clients[1:])
    assert [r.client.address for r in replicas.usable()] == [B]
    weights.detach()
    replicas.close()


class Stats:
    weight_version = 3


@pytest.mark.parametrize(
    ("given", "mode", "field"),
    [
        (None, "server", "inference_address"),
        ([], "server", "inference_address"),
        ([A, ""], "server", "inference_address"),
        ([A, "nowhere"], "server", "inference_address"),
        ([A, A], "server", "addresses"),
        ([A, B], "colocate", "vllm_mode"),
    ],
)
def test_what_cannot_be_is_named(given: Any, mode: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        reached("NONE", "inference_address", given, None, mode)
    assert [violation.field for violation in raised.value.violations] == [field]


class Several(ReplicatedWeights):
    """Of which one comes back after so many looks."""

    def __init__(self, comes_back: int) -> None:
        self.left, self.synced = comes_back, 0

    @property
    def current(self) -> frozenset[InferenceClient]:
        return frozenset() if self.left > 0 else frozenset({object()})  # type: ignore[arg-type]

    def catch_up(self) -> None:
        self.left -= 1

    def sync(self) -> None:
        self.synced += 1


@pytest.mark.parametrize(("comes_back", "patience_s", "synced"), [(0, 60, 0), (2, 60, 0), (99, 0, 1)])
def test_a_version_is_brought_to_who_comes_back_before_another_is_made(
    comes_back: int, patience_s: float, synced: int
) -> None:
    weights = Several(comes_back)
    restore(weights, patience_s)
    assert weights.synced == synced
