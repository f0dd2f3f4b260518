"""Nothing waits in NCCL without a deadline, and whatever ends a wait ends the communicator. Without a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from weight_transfer.cuda import nccl
from weight_transfer.cuda.nccl import Communicator, NcclError


class Core:
    """What NCCL says of itself."""

    def __init__(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.ready = ready
        self.aborted = 0
        self.hangs = threading.Event()
        self.hangs.set()

    def abort(self) -> None:
        self.hangs.wait(10)
        self.aborted += 1


class Event:
    """Of a window that arrives after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def joined(core: Core, check: Callable[[], None] = lambda: None) -> Any:
    communicator: Any = object.__new__(Communicator)
    communicator._core, communicator._check = core, check
    return communicator


def test_what_arrives_is_waited_for() -> None:
    core, event = Core(), Event(50)
    joined(core).wait(event)
    assert (event.looks, core.aborted) == (-1, 0)


def test_what_does_not_arrive_ends_it() -> None:
    core = Core()
    began = time.monotonic()
    with pytest.raises(NcclError, match=r"the other side stopped within 0\.2 s"):
        joined(core).wait(Event(1 << 60), 0.2)
    assert 0.2 <= time.monotonic() - began < 2
    assert core.aborted == 1


def test_an_update_that_is_over_ends_it_at_once() -> None:
    class OverError(Exception):
        pass

    def over() -> None:
        raise OverError

    core = Core()
    with pytest.raises(OverError):
        joined(core, over).wait(Event(1 << 60), 60)
    assert core.aborted == 1


def test_what_nccl_says_ends_it() -> None:
    def fails() -> bool:
        raise RuntimeError("ncclRemoteError: remote process exited")

    core = Core(fails)
    with pytest.raises(NcclError, match="remote process exited"):
        joined(core).wait(Event(1 << 60), 60)
    assert core.aborted == 1


def test_an_abort_that_hangs_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_ABORT_S", 0.2)
    core = Core()
    core.hangs.clear()
    began = time.monotonic()
    joined(core).abort()
    assert 0.2 <= time.monotonic() - began < 2
    assert core.aborted == 0
    core.hangs.set()
