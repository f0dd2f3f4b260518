"""What a watch shows, to the letter."""

from __future__ import annotations

import doctest
import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from tandem.cli import arguments, board, jobs
from tandem.cli.board import Board, plain, sparkline
from tandem.cli.plot import chosen, gather
from tandem.client import (
    Checkpoint,
    CheckpointSaved,
    Event,
    Job,
    JobState,
    Log,
    Metrics,
    Sample,
    Samples,
    StateChange,
)
from tandem.client._sync.calls import Calls
from tandem.errors import InvalidArgument
from tandem.trainer.v1 import job_pb2

TIME = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def step(number: int, **values: float) -> Metrics:
    return Metrics(
        number, TIME, 1, number, 4, number / 4, {k.replace("__", "/"): v for k, v in values.items()}
    )


EVENTS: list[Event] = [
    StateChange(1, TIME, 1, JobState.QUEUED, JobState.RUNNING, ""),
    Log(2, TIME, 1, "loaded\x1b[2J in 3 s"),
    step(1, reward=0.25, loss=0.5, tandem__tokens_per_second=812.4),
    step(2, reward=0.5, loss=-0.001, tandem__tokens_per_second=900.0, tandem__sync_ms=8.76, kl=0.1),
    Samples(
        5,
        TIME,
        1,
        2,
        (
            Sample("2 + 2?", "4\n", {"exact": 1.0, "brief": 0.5}, 0.7, 3),
            Sample("x" * 500, "y", {}, None, 3),
            Sample("2 + 3?", "five", {"exact": 0.0}, None, 3),
        ),
    ),
    CheckpointSaved(6, TIME, 1, Checkpoint(2, "/jobs/j1/checkpoint-2", 12_340_000, TIME)),
    StateChange(7, TIME, 1, JobState.RUNNING, JobState.FAILED, "the reward said no"),
    Event(8, TIME, 1),
]

PLAIN = f"""\
RUNNING
log loaded\\x1b[2J in 3 s
step 1/4 reward 0.25 loss 0.5 tokens/s 812
step 2/4 reward 0.5 loss -0.001 tokens/s 900 sync ms 8.8
sample [brief=0.5 exact=1 version=3] 2 + 2? -> 4\\n
sample [version=3] {"x" * 197}... -> y
sample [exact=0 version=3] 2 + 3? -> five
checkpoint /jobs/j1/checkpoint-2 (12.3 MB)
FAILED: the reward said no
an event that this client does not know
"""

BOARD = f"""\
j1 grpo FAILED  the reward said no
step    {"━" * 20}                      2/4
reward  ▁█                                        0.5
loss    █▁                                        -0.001
tokens/s 900   sync ms 8.8
[exact=0 version=3] 2 + 3? -> five
checkpoint /jobs/j1/checkpoint-2
"""


@pytest.fixture
def job() -> Job:
    message = job_pb2.Job(id="j1", spec=job_pb2.JobSpec(grpo={}), state=job_pb2.JOB_STATE_QUEUED)
    return Job(Calls(lambda channel: None, "trainer", "unix:///none", {}), message, 1.0, 1.0)


def test_plain_lines() -> None:
    lines = [plain(event) for event in EVENTS]
    assert all(line.startswith("2026-05-04T03:02:01Z ") for text in lines for line in text.splitlines())
    assert "\n".join(lines).replace("2026-05-04T03:02:01Z ", "") + "\n" == PLAIN
    assert plain(Samples(1, TIME, 1, 1, ())) == ""


def test_the_board(job: Job) -> None:
    shown = Board(job)
    for event in EVENTS:
        shown.add(event)
    text = io.StringIO()
    Console(file=text, width=120, color_system=None, legacy_windows=False).print(shown)
    assert "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n" == BOARD


def test_a_board_of_a_job_without_events(job: Job) -> None:
    text = io.StringIO()
    Console(file=text, width=80, color_system=None).print(Board(job))
    first, second = text.getvalue().splitlines()
    assert first.rstrip() == "j1 grpo QUEUED"
    assert second.split()[-1] == "0/?"


def test_a_board_of_a_job_that_loads_shows_what_it_writes(job: Job) -> None:
    shown, text = Board(job), io.StringIO()
    shown.add(EVENTS[1])
    Console(file=text, width=80, color_system=None).print(shown)
    assert text.getvalue().splitlines()[-1].rstrip() == "loaded\\x1b[2J in 3 s"


def test_rewards_by_the_names_of_other_algorithms(job: Job) -> None:
    shown = Board(job)
    shown.add(step(1, objective__scores=0.5, rewards__chosen=9.0))
    shown.add(step(2, rewards__chosen=2.0))
    assert list(shown.rewards) == [0.5, 2.0]


def test_a_sparkline_is_as_wide_as_it_may_be() -> None:
    assert sparkline([], 5) == ""
    assert sparkline(range(100), 5) == "▁▃▅▇█"
    assert sparkline([float("inf"), float("nan")]) == "  "
    assert sparkline([0.0, float("-inf"), 1.0]) == "▁ █"


def test_curves_take_a_step_done_again_as_it_was_the_last_time() -> None:
    curves = gather([step(1, reward=1.0), step(2, reward=2.0), step(1, reward=3.0, kl=0.5)])
    assert curves == {"reward": [(1, 3.0), (2, 2.0)], "kl": [(1, 0.5)]}


def test_curves_to_draw() -> None:
    curves = gather([step(1, loss=1.0, objective__scores=1.0, zzz=1.0)])
    assert chosen(curves, []) == ["objective/scores", "loss"]
    assert chosen(curves, ["zzz"]) == ["zzz"]
    assert chosen(gather([step(1, zzz=1.0)]), []) == ["zzz"]
    with pytest.raises(InvalidArgument, match=r"the job has no 'reward'; it has loss, objective/scores, zzz"):
        chosen(curves, ["reward"])
    with pytest.raises(InvalidArgument, match="has no metrics yet"):
        chosen({}, [])


@pytest.mark.parametrize("module", [arguments, board, jobs])
def test_examples_in_docstrings_are_true(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed
