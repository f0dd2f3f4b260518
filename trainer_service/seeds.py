"""Seeds of rollouts: a function of where in the run they are drawn, so that a resumed run draws the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple


class Call(NamedTuple):
    """One of a run's calls for rollouts: the `number`-th, from 0, since `step` steps of the optimizer were done.

    Those of evaluations count apart: a resumed run does not repeat the one that came before its checkpoint.
    """

    step: int
    number: int
    evaluating: bool = False

    def seed(self, root: int, rank: int) -> int:
        """Of the call's first rollout on this rank; those after it count up. In [0, 2**63), and as good as random."""
        name = f"{root}/{self.step}/{self.number}/{self.evaluating:d}/{rank}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


class Numbering:
    """Numbers the calls of a run, step by step: nothing of it has to outlive the process."""

    def __init__(self, where: Callable[[], tuple[int, bool]] = lambda: (0, False)) -> None:
        """`where` tells how many steps are done, and whether the run evaluates."""
        self._where = where
        self._last: dict[bool, Call] = {}

    def next(self) -> Call:
        """The call that is made now."""
        step, evaluating = self._where()
        last = self._last.get(evaluating)
        number = last.number + 1 if last is not None and last.step == step else 0
        self._last[evaluating] = call = Call(step, number, evaluating)
        return call

    def restart(self) -> None:
        """A run begins, perhaps at a step that another of this process ended with."""
        self._last.clear()
