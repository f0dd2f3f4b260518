"""A job's process that is told to end while it loads. What it loads is a stand-in: libraries catch what they like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.errors import FailedPrecondition, Reason, TandemError, Unavailable
from tests.jobs import spec
from tests.ranks import ON_CPU, ended, of_script, two_ranks
from trainer_service import ranks
from trainer_service.jobs import child
from trainer_service.jobs.folder import JobFolder, Outcome

#: Tells itself to end in the midst of an import, which does one thing or another with what the handler raises.
PROGRAM = """
import importlib.machinery, os, signal, sys, time
from trainer_service.jobs import child
from trainer_service.jobs.stopping import Stopped

class Report:
    training = stopping = False
    def __init__(self, *args, **kwargs): pass

class Library:
    def find_spec(self, name, path=None, target=None):
        if name != "trainer_service.jobs.report":
            return None
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Stopped:
            if sys.argv[3] == "raises another error":
                raise RuntimeError("already initialized") from None
            if sys.argv[3] == "lets it pass":
                raise
        return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module): module.Report = Report

def train(folder, attempt, report):
    if report.stopping:  # as the real one sees it when the training is to begin
        raise Stopped
    raise AssertionError("nobody knows that it was told to end")

sys.meta_path.insert(0, Library())
child._train = train
sys.exit(child.main(sys.argv[1:3]))
"""


@pytest.mark.parametrize("library", ["lets it pass", "raises another error", "swallows it"])
def test_one_that_is_told_to_end_while_it_loads_has_stopped(tmp_path: Path, library: str) -> None:
    folder = JobFolder(tmp_path / "job")
    folder.make(spec())
    command = [sys.executable, "-c", PROGRAM, str(folder.path), "1", library]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert folder.outcome(1) == (Outcome.STOPPED, "")


#: Two ranks, of which the second one ends while the first one waits for it.
RANK = """
    import os, signal, sys
    from trainer_service.jobs import child

    def train(folder, attempt, report):
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 1:
            if sys.argv[3] == "raises":
                raise ValueError("no reward")
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    child._train = train
    os._exit(child.main(sys.argv[1:3]))
"""


@pytest.mark.parametrize("end", ["is killed", "raises"])
def test_a_rank_that_is_left_alone_is_not_to_blame(tmp_path: Path, end: str) -> None:
    folder = JobFolder(tmp_path / "job")
    folder.make(spec())
    with two_ranks(*of_script(RANK, folder.path, 1, end), **ON_CPU) as ranks:
        codes = [code for code, _ in ended(ranks)]
    outcome, reason = folder.outcome(1)
    if end == "raises":
        assert (outcome, reason) == (Outcome.FAILED, "ValueError: no reward")
    else:
        assert outcome is Outcome.DIED
        assert codes == [1, -9]
        assert "gloo" in reason


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unavailable(Reason.UNREACHABLE, "the engine is gone"), Outcome.DIED),
        (FailedPrecondition(Reason.LORA_OFF, "no adapters"), Outcome.FAILED),
        (ValueError("no reward"), Outcome.FAILED),
    ],
)
def test_what_passes_on_one_rank_passes_on_the_others(
    tmp_path: Path, error: Exception, outcome: Outcome
) -> None:
    folder = JobFolder(tmp_path)
    with pytest.raises((TandemError, ranks.OtherRankError)) as heard:
        ranks.raise_for([b"", ranks.said(error, "{} (rank 1)")])
    assert str(heard.value).endswith(f"{error.args[-1]} (rank 1)")
    assert child._failure(error, folder)[0] is outcome
    assert child._failure(heard.value, folder)[0] is outcome
