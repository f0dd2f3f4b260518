"""How an attempt ended whose inference service did. What runs is neither training nor engine here."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import spec
from trainer_service.jobs import run
from trainer_service.jobs.folder import JobFolder, Outcome
from trainer_service.jobs.run import Attempt


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    """The second one of a job, whose training sleeps."""
    folder = JobFolder(tmp_path / "job")
    folder.make(spec())
    made = Attempt(folder, 2)
    training = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(made, "_start_training", lambda: training)
    before = signal.getsignal(signal.SIGTERM)
    yield made
    signal.signal(signal.SIGTERM, before)
    training.kill()
    training.wait()


def engine(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(run, "engine_command", lambda *_: ["sh", "-c", script])


def test_an_attempt_that_is_done_stays_so(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends while the training is on its way out."""
    engine(monkeypatch, "exit 3")
    attempt._folder.tell_outcome(2, Outcome.SUCCEEDED)
    attempt.run()
    assert attempt._folder.outcome(2)[0] is Outcome.SUCCEEDED


def test_the_engine_is_the_reason_where_the_training_misses_it(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(monkeypatch, "echo tandem: no such option; exit 2")
    attempt._folder.tell_outcome(2, Outcome.DIED, "nobody answers")
    attempt.run()
    said = "its inference service ended with code 2: no such option"
    assert attempt._folder.outcome(2) == (Outcome.FAILED, said)


def test_the_reason_is_of_this_attempts_engine(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt._folder.engine_file.write_text("tandem: no network in the first attempt\n")
    engine(monkeypatch, "echo loading; kill -9 $$")
    attempt.run()
    assert attempt._folder.outcome(2) == (Outcome.DIED, "its inference service ended with code -9: loading")
