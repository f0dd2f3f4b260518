"""A job's account of rollouts, read and checked: `python -m trainer_service.jobs.account FOLDER...`.

Each line of `rollouts.jsonl` is of one `attempt` and one `rank`. One with `begin` says after which step the attempt
goes on: what earlier lines say of later steps is void, since that work was lost with its process. One with `step` says
what that step of the optimizer took: the groups that were `generated` for it, each with the weight version and the
digest of every rollout, and the rollouts that it was `trained` on, by group and index, with their joined digest.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer_service.account import joined

_FILE = "rollouts.jsonl"


@dataclass
class History:
    """What counts of an account: the steps of each rank, without those that were lost, and how often rollouts count."""

    steps: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    passes: int = 1
    attempts: int = 0
    lost: int = 0

    @property
    def groups(self) -> dict[str, dict[int, str]]:
        """The digests of the rollouts of each group, by index, in the order of their generation."""
        found: dict[str, dict[int, str]] = {}
        for line in self._lines():
            for group in line["generated"]:
                rollouts = {int(index): digest for index, digest in group["rollouts"].items()}
                found.setdefault(group["group"], {}).update(rollouts)
        return found

    def versions(self) -> dict[str, int]:
        """The weight version that sampled each group."""
        return {
            group["group"]: group["weight_version"] for line in self._lines() for group in line["generated"]
        }

    def same(self, other: History) -> bool:
        """Whether the other's steps took the same rollouts of the same weight versions."""
        return self._comparable() == other._comparable()

    def faults(self) -> list[str]:
        """What is wrong: nothing, where each rollout was trained on as often as it shall be, by steps in a row."""
        found = []
        for rank, lines in self.steps.items():
            if (steps := [line["step"] for line in lines]) != list(range(1, len(steps) + 1)):
                found.append(f"rank {rank}: the steps are {steps}, not 1 to {len(steps)}")
        groups = self.groups
        times: Counter[tuple[str, int]] = Counter()
        for line in self._lines():
            for trained in line["trained"]:
                name, known = trained["group"], groups.get(trained["group"], {})
                members = [(index, known.get(index, "")) for index in trained["rollouts"]]
                if joined(members) != trained["digest"]:
                    found.append(
                        f"step {line['step']}: trained on other rollouts than were generated as {name}"
                    )
                times.update((name, index) for index, _ in members)
        last = max((_generation(name) for name in groups), default=None)
        for name, rollouts in groups.items():
            for index in rollouts:
                count = times.pop((name, index), 0)
                # Those of the last generation may have steps to go, or none left in the job.
                if count > self.passes or (count < self.passes and _generation(name) != last):
                    found.append(f"rollout {index} of {name}: trained on {count} times, not {self.passes}")
        found += [f"rollout {index} of {name}: trained on, never generated" for name, index in times]
        return found

    def _lines(self) -> list[dict[str, Any]]:
        return [line for lines in self.steps.values() for line in lines]

    def _comparable(self) -> dict[int, list[tuple[Any, ...]]]:
        return {
            rank: [(line["step"], line["generated"], line["trained"]) for line in lines]
            for rank, lines in self.steps.items()
        }


def history(folder: Path) -> History:
    """Read a job's account. Raises OSError where there is none."""
    found, attempts = History(), set()
    for text in (folder / _FILE).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:  # empty, or its writer was killed within it
            continue
        attempts.add(line["attempt"])
        lines = found.steps.setdefault(line["rank"], [])
        if "begin" in line:
            found.passes = line["passes"]
            kept = [one for one in lines if one["step"] <= line["begin"]]
            found.lost += len(lines) - len(kept)
            lines[:] = kept
        else:
            lines.append(line)
    found.attempts = len(attempts)
    return found


def _generation(group: str) -> tuple[int, int]:
    step, number, _ = group.split(".")
    return int(step), int(number)


def main(folders: list[str]) -> int:
    """Check the accounts of jobs' folders. The number of those that are wrong."""
    wrong = 0
    for name in folders:
        found = history(Path(name))
        faults = found.faults()
        wrong += bool(faults)
        steps = max((len(lines) for lines in found.steps.values()), default=0)
        told = f"{steps} steps, {len(found.groups)} groups, {found.attempts} attempts, {found.lost} steps done anew"
        verdict = "WRONG" if faults else f"each rollout was trained on {found.passes} times"
        print(f"{name}: {told}: {verdict}")  # noqa: T201
        for fault in faults:
            print(f"  {fault}")  # noqa: T201
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
