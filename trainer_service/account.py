"""The account of rollouts: which groups were generated, and which step of the optimizer was trained on which rollouts.

A group is named by the steps done when it was generated, the number of the generation since then, and the prompt's
place in it: the same in a resumed run as in one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a rollout is from: the `number`-th of its group."""

    step: int
    generation: int
    prompt: int
    number: int

    @property
    def group(self) -> str:
        """The name of its group."""
        return f"{self.step}.{self.generation}.{self.prompt}"


class Account:
    """One process's part of it, written step by step."""

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._write = write
        self._generated: list[dict[str, Any]] = []
        self._trained: list[tuple[Place, str]] = []

    def begin(self, step: int, passes: int) -> None:
        """Training begins after `step` steps, and goes `passes` times over each rollout.

        What was written of later steps before, an attempt did whose work is lost.
        """
        self._generated, self._trained = [], []
        self._write({"begin": step, "passes": passes})

    def generated(self, rollouts: Iterable[tuple[Place, str]], weight_version: int) -> None:
        """Note new rollouts with their digests, of one weight version."""
        for name, members in _groups(rollouts).items():
            found = {"group": name, "weight_version": weight_version, "rollouts": dict(members)}
            self._generated.append(found)

    def trained(self, rollouts: Iterable[tuple[Place, str]]) -> None:
        """Note that the step that is under way is trained on these."""
        self._trained += rollouts

    def step_done(self, step: int) -> None:
        """Write what `step` took, now that the optimizer has done it."""
        trained = [
            {"group": name, "rollouts": [number for number, _ in members], "digest": joined(members)}
            for name, members in _groups(self._trained).items()
        ]
        self._write({"step": step, "generated": self._generated, "trained": trained})
        self._generated, self._trained = [], []


def digest(*parts: Sequence[int]) -> str:
    """Of token ids: which they are, and which part has which."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(f"{list(part)}".encode())
    return found.hexdigest()


def joined(members: Iterable[tuple[int, str]]) -> str:
    """The digest of several rollouts in order, from their own."""
    text = "".join(digest for _, digest in members)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _groups(rollouts: Iterable[tuple[Place, str]]) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for place, digest in rollouts:
        found.setdefault(place.group, []).append((place.number, digest))
    return found
