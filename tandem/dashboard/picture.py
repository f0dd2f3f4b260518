"""What is kept of a job's events, in bounded memory: the curves thinned evenly, of all else the newest."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

#: Points of a curve at most. A longer one has every second of its points left out, again and again.
POINTS = 2000
#: Events of the other kinds.
KEPT = {"state": 50, "samples": 12, "log": 500, "checkpoint": 20}


@dataclass(frozen=True, slots=True)
class Told:
    """An event as pages get it."""

    sequence: int
    kind: str
    data: str
    """Its JSON."""
    step: int = 0
    """Optimizer's steps done, for metrics."""


class Picture:
    """The events that a page which has just been opened begins with."""

    def __init__(self) -> None:
        self._curve = Thinned(POINTS)
        self._others = {kind: deque[Told](maxlen=limit) for kind, limit in KEPT.items()}

    def add(self, told: Told) -> None:
        """Take an event into account. One of a kind that no page shows is left out."""
        if told.kind == "metrics":
            self._curve.add(told)
        elif told.kind in self._others:
            self._others[told.kind].append(told)

    def data(self) -> str:
        """Its events in order, as JSON: a list of kind and event."""
        kept = sorted(
            [*self._curve.points, *(told for events in self._others.values() for told in events)],
            key=lambda told: told.sequence,
        )
        pairs = ",".join(f'["{told.kind}",{told.data}]' for told in kept)
        return f"[{pairs}]"


class Thinned:
    """Metrics in order of their steps, never more than a limit and at least about half of it, evenly spread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[tuple[int, Told]] = []
        self._stride, self._turn = 1, 0

    @property
    def points(self) -> list[Told]:
        """What is left."""
        return [told for _, told in self._kept]

    def add(self, told: Told) -> None:
        """Add the next. Steps that are done again, after a checkpoint, replace what they were before."""
        while self._kept and self._kept[-1][1].step > told.step:
            self._kept.pop()
        # The newest is always there, and stays only if it is its turn.
        if self._kept and self._kept[-1][0] % self._stride:
            self._kept.pop()
        self._kept.append((self._turn, told))
        self._turn += 1
        if len(self._kept) > self._limit:
            self._stride *= 2
            *others, newest = self._kept
            self._kept = [*(kept for kept in others if kept[0] % self._stride == 0), newest]
