"""The trainer says which of its tensors are the engine's memory, and why others are not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.policies import Engine, Policy, digest_of, engine, policy, service
from tests.weight_service import network
from trainer_service.session import told
from weight_transfer.transports import shared
from weight_transfer.write import write

__all__ = ["engine", "policy", "service"]  # fixtures


def test_each_reason_is_told_with_how_many_and_one_of_them() -> None:
    reasons = {"a": "", "b": "other dtype", "c": "two blocks", "d": "other dtype"}
    assert told(reasons) == (
        "1 of 4 tensors are the engine's memory; other dtype (2, as b); two blocks (1, as c)"
    )


@pytest.mark.parametrize(
    ("dtype", "mode", "reason"),
    [
        (torch.float32, "in_place", "the trainer's dtype is float32, the engine's bfloat16"),
        (torch.bfloat16, "staged", "updates are staged"),
        (torch.bfloat16, "in_place", ""),
    ],
)
def test_a_session_says_why(
    engine: Engine,
    policy: Policy,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    mode: str,
    reason: str,
) -> None:
    model = network(dtype)
    weights = policy(model, "shared", mode=mode)
    with caplog.at_level(logging.INFO, "trainer_service.session"):
        weights.sync()
    session = weights._session
    assert session is not None
    aliased = {name for name, why in session.alias_reasons.items() if not why}
    named = dict(model.named_parameters())
    assert set(session.alias_reasons) == set(session.names)
    assert {id(named[name]) for name in aliased & set(named)} == set(weights.parameters)
    (line,) = [record.getMessage() for record in caplog.records if "engine's memory" in record.getMessage()]
    assert line == told(session.alias_reasons)
    if reason:
        assert reason in session.alias_reasons.values()
        assert reason in line


def test_what_was_written_whole_is_written_the_same_way_again(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where planning takes longer than writing. This stands for what is planned there."""
    made, done = [], []

    def again(items: Sequence[Any], arenas: Sequence[Any]) -> Callable[[], list[int]]:
        made.append(len(items))

        def once_more() -> list[int]:
            done.append(len(items))
            return write(items, arenas)

        return once_more

    monkeypatch.setattr(shared, "again", again)
    model = network(torch.float32)
    weights = policy(model, "shared")
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        weights.sync()
        assert engine.digest == digest_of(model)
    assert (len(made), len(done)) == (1, 2)
    next(model.parameters()).data = next(model.parameters()).data.clone()  # elsewhere now
    weights.sync()
    assert (len(made), len(done)) == (2, 2)
