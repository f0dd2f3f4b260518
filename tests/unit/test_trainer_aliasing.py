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


def test_parameters_for_which_there_is_no_room_have_it_once_the_engines_memory_is_let_go(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host holds meanwhile is what they were, and the session is over."""
    model = network(torch.bfloat16)
    weights = policy(model, "shared")
    weights.sync()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    session, clone, cloned = weights._session, torch.Tensor.clone, []
    assert session is not None
    arenas = session.transport._arenas  # type: ignore[attr-defined]

    def full(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if cloned and arenas:
            raise torch.OutOfMemoryError("CUDA out of memory")
        cloned.append(tensor)
        return clone(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "clone", full)
    weights.detach()
    monkeypatch.undo()
    assert len(cloned) == 1 < len(before)
    assert arenas == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # it is nobody else's
    again = policy(network(torch.bfloat16), "shared")
    again.sync()  # the lease is free
    assert again.aliased


def test_a_device_without_room_in_an_update_is_an_error_that_changes_nothing(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another model takes the place of the first, whose parameters then get memory of their own."""
    model = network(torch.bfloat16)
    weights = policy(model, "shared")
    weights.sync()
    transport: Any = weights._session.transport  # type: ignore[union-attr]
    held = dict(transport.aliased)

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "clone", full)
    with pytest.raises(torch.OutOfMemoryError):
        transport._let_go_of_others(set())
    monkeypatch.undo()
    assert transport.aliased == held


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
