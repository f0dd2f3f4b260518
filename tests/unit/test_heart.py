"""Heartbeats of several leases from one thread."""

from __future__ import annotations

import threading
import time

from trainer_service.heart import Heart


class Beaten:
    """Remembers when it was."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.threads: set[int] = set()

    def beat(self) -> None:
        self.at.append(time.monotonic())
        self.threads.add(threading.get_ident())


def until(many: int, lease: Beaten, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while len(lease.at) < many:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_each_beats_in_its_own_time_from_one_thread() -> None:
    heart, slow, quick = Heart(), Beaten(), Beaten()
    began = time.monotonic()
    heart.add(slow, 0.4)
    heart.add(quick, 0.02)  # sooner than the thread would have looked
    until(5, quick)
    assert not slow.at or slow.at[0] - began >= 0.4
    until(1, slow)
    assert slow.at[0] - began >= 0.4
    assert slow.threads == quick.threads != {threading.get_ident()}
    assert all(at - began >= 0.02 * k for k, at in enumerate(quick.at, 1)), "never too often"
    heart.remove(slow)
    heart.remove(quick)


def test_one_that_was_removed_beats_no_more_and_the_next_does() -> None:
    heart, first, second = Heart(), Beaten(), Beaten()
    heart.add(first, 0.01)
    until(2, first)
    heart.remove(first)
    time.sleep(0.3)  # one that had begun may end
    beats = len(first.at)
    time.sleep(0.05)
    assert len(first.at) == beats
    heart.remove(first)  # again: nothing happens
    heart.add(second, 0.01)
    until(2, second)
    heart.remove(second)
