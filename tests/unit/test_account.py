"""The account of rollouts: what is told of a job's attempts, and which faults are found in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer_service.account import Account, Place, digest
from trainer_service.jobs import account
from trainer_service.jobs.account import history
from trainer_service.jobs.folder import JobFolder, LineLog

GROUPS, ROLLOUTS = 2, 3


class Run:
    """A training whose every other step generates, for two steps."""

    def __init__(self, folder: Path, passes: int = 1) -> None:
        self._folder, self._passes, self._attempt = JobFolder(folder), passes, 0
        self._held: list[tuple[Place, str]] = []
        self.saved: dict[int, list[tuple[Place, str]]] = {0: []}

    def attempt(self, after: int, until: int, *, salt: int = 0) -> None:
        """Do steps, saving a checkpoint after each. `salt` makes rollouts differ."""
        self._attempt += 1
        log = LineLog(self._folder.rollouts_file)

        def write(line: Mapping[str, Any]) -> None:
            log.append({"attempt": self._attempt, "rank": 0} | dict(line))

        made, self._held = Account(write), list(self.saved[after])
        made.begin(after, self._passes)
        for step in range(after + 1, until + 1):
            if not self._held:
                places = [Place(step - 1, 0, p, r) for p in range(GROUPS) for r in range(ROLLOUTS)]
                new = [(place, digest([place.prompt], [*place, salt])) for place in places]
                made.generated(new, weight_version=step + 1)
                self._held = [*new[1::2], *new[::2]] * self._passes  # in another order
            count = GROUPS * ROLLOUTS * self._passes // 2
            made.trained(self._held[:count])
            self._held = self._held[count:]
            made.step_done(step)
            self.saved[step] = list(self._held)
        log.close()


@pytest.mark.parametrize("passes", [1, 2])
def test_an_attempt_goes_on_where_a_checkpoint_is_and_what_came_after_it_is_void(
    tmp_path: Path, passes: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    Run(whole, passes).attempt(0, 8)
    run = Run(cut, passes)
    run.attempt(0, 5)
    run.attempt(3, 4)
    run.attempt(3, 8)
    assert history(cut).faults() == history(whole).faults() == []
    assert history(cut).same(history(whole))
    assert (history(cut).attempts, history(cut).lost, history(whole).lost) == (3, 3, 0)
    assert len(history(cut).groups) == 4 * GROUPS
    assert history(cut).versions()["4.0.1"] == 6


def test_other_rollouts_after_a_checkpoint_are_seen(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    Run(whole).attempt(0, 4)
    run = Run(cut)
    run.attempt(0, 2)
    run.attempt(2, 4, salt=1)
    assert history(cut).faults() == []
    assert not history(cut).same(history(whole))


def change(folder: Path, number: int, edit: Any) -> None:
    file = folder / "rollouts.jsonl"
    lines = file.read_text().splitlines()
    line = json.loads(lines[number])
    edit(line)
    lines[number] = json.dumps(line)
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (
            lambda line: line["trained"].append(dict(line["trained"][0])),
            "of 2.0.0: trained on 2 times, not 1",
        ),
        (lambda line: line["trained"].pop(), "of 2.0.1: trained on 0 times, not 1"),
        (
            lambda line: line["generated"][0]["rollouts"].update({"1": "0" * 16}),
            "step 3: trained on other rollouts than were generated as 2.0.0",
        ),
        (lambda line: line["generated"].clear(), "of 2.0.0: trained on, never generated"),
        (lambda line: line.update(step=4), "the steps are [1, 2, 4, 4, 5, 6], not 1 to 6"),
    ],
    ids=["twice", "never", "others", "from nowhere", "a step twice"],
)
def test_faults_are_history(
    tmp_path: Path, edit: Any, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path).attempt(0, 6)
    assert account.main([str(tmp_path)]) == 0
    assert "6 steps, 6 groups, 1 attempts, 0 steps done anew: each" in capsys.readouterr().out
    change(tmp_path, 3, edit)
    assert any(fault in one for one in history(tmp_path).faults()), history(tmp_path).faults()
    assert account.main([str(tmp_path)]) == 1
    assert fault in capsys.readouterr().out


def test_rollouts_of_the_last_generation_may_wait_for_their_step_and_lines_may_be_half(
    tmp_path: Path,
) -> None:
    Run(tmp_path).attempt(0, 5)
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"attempt": 1, "rank": 0, "ste')
    assert history(tmp_path).faults() == []
    run = Run(tmp_path)  # whose first line ends the half one
    run._attempt = 1
    run.saved[5] = []
    run.attempt(5, 5)
    assert history(tmp_path).attempts == 2
    assert len(history(tmp_path).groups) == 3 * GROUPS


def test_digests_know_which_part_has_which_tokens() -> None:
    assert len({digest([1], [2, 3]), digest([1, 2], [3]), digest([1, 2, 3], []), digest([12], [3])}) == 4
