"""Memory that engine and trainer take in turns. The device is played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.errors import Reason, Unavailable
from trainer_service import room
from trainer_service.room import Room


class Played:
    """A device of which so much is free, and what was asked of its engine and its allocator."""

    def __init__(self) -> None:
        self.free = 0
        self.frees = 1000
        self.gone = False
        self.asked: list[str] = []

    def sleep(self) -> int:
        self.asked.append("sleep")
        if self.gone:
            raise Unavailable(Reason.UNREACHABLE, "gone")
        return self.frees

    def wake_up(self) -> None:
        self.asked.append("wake_up")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (made.free, 10**6))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.asked.append("empty_cache"))
    monkeypatch.setattr(torch, "tensor", lambda values, **_: values[0])
    monkeypatch.setattr(room, "broadcast", lambda value, from_process: value)
    return made


def of(played: Played, device: str = "cuda", *, main: bool = True, shared: bool = True) -> Room:
    accelerator = SimpleNamespace(device=SimpleNamespace(type=device), is_main_process=main)
    client: Any = played
    return Room(client, accelerator, shared=shared)


def test_torch_frees_what_it_keeps_where_the_engine_would_not_find_its_own_again(played: Played) -> None:
    shared = of(played)
    shared.make()
    assert played.asked == [], "nothing was freed yet"
    shared.free()
    played.frees = 0  # of an engine that slept already
    shared.free()
    for played.free, asked in ((1249, ["empty_cache"]), (1250, [])):
        played.asked.clear()
        shared.make()
        assert played.asked == asked


def test_an_engine_that_is_awake_has_its_memory(played: Played) -> None:
    """As in a loop of tools, which asks for rollouts turn by turn."""
    shared = of(played)
    for _ in range(2):
        shared.free()
        shared.make()
        shared.wake()
        shared.wake()
        assert played.asked == ["sleep", "empty_cache", "empty_cache", "wake_up", "wake_up"]
        played.asked.clear()


def test_other_ranks_are_told_and_ask_for_nothing(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "broadcast", lambda value, from_process: 1000)
    other = of(played, main=False)
    other.free()
    other.make()
    assert played.asked == ["empty_cache"]


@pytest.mark.parametrize(("device", "shared"), [("cpu", True), ("cuda", False)])
def test_for_an_engine_on_another_device_nothing_is_freed(played: Played, device: str, shared: bool) -> None:
    apart = of(played, device, shared=shared)
    apart.free()
    apart.make()
    assert played.asked == ["sleep"]


def test_other_ranks_do_not_wait_where_the_engine_is_gone(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(room, "broadcast", lambda value, from_process: told.append(value) or value)
    played.gone = True
    with pytest.raises(Unavailable):
        of(played).free()
    assert told == [0]
