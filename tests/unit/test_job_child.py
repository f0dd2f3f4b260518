"""A job's process that is told to end while it loads. What it loads is a stand-in: libraries catch what they like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import spec
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
