"""What a program started ends with it, whatever that does about it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tandem.processes import Child, ChildError, Interrupted, Processes

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(grandchild.pid, flush=True)
time.sleep(600)
"""


def module(folder: Path, text: str) -> dict[str, str]:
    """Make `text` the module `script`. The environment that finds it."""
    (folder / "script.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def wait_for_output(child: Child) -> str:
    end = time.monotonic() + 20
    assert child.log is not None
    while not (text := child.log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return text


def wait_for_end(child: Child, processes: Processes) -> None:
    while not child.ended():
        processes.wait()


def test_flags_reach_the_module(tmp_path: Path) -> None:
    with Processes(tmp_path, module(tmp_path, "import sys; print(sys.argv[1:])")) as processes:
        wait_for_end(processes.start("echo", "script", some_flag=1, engine=["a=1", "b=2"]), processes)
    assert (tmp_path / "echo.log").read_text().split() == [
        "['--some-flag=1',",
        "'--engine=a=1',",
        "'--engine=b=2']",
    ]


def test_a_failure_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    environment = module(tmp_path, "print('first'); raise SystemExit('no luck')")
    with Processes(tmp_path, environment) as processes:
        child = processes.start("failing", "script")
        ending = r"(?s)script ended with code 1\. .*failing\.log.*first.*no luck"
        with pytest.raises(ChildError, match=ending):
            wait_for_end(child, processes)


def test_what_does_not_want_to_end_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.processes.GRACE_S", 0.2)
    with Processes(tmp_path, module(tmp_path, STUBBORN)) as processes:
        child = processes.start("stubborn", "script")
        grandchild = psutil.Process(int(wait_for_output(child)))
        assert grandchild.is_running()
    grandchild.wait(5)


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    environment = module(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    program = """
import os, sys, time
from pathlib import Path
from tandem.processes import Processes
with Processes(Path(sys.argv[1]), {}) as processes:
    child = processes.start("sleeping", "script")
    while not child.log.read_text():
        processes.wait()
    os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, env=os.environ | environment, timeout=20).returncode == -signal.SIGKILL
    child = int((tmp_path / "sleeping.log").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(5)


def test_output_may_go_where_ours_goes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Processes(None, module(tmp_path, "print('here'); raise SystemExit(3)")) as processes:
        child = processes.start("loud", "script", nothing=None)
        with pytest.raises(ChildError, match="script ended with code 3: its output above says why"):
            wait_for_end(child, processes)
    assert capfd.readouterr().out == "here\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_everything(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name):  # noqa: PT012  one statement in spirit
        with Processes(
            tmp_path, module(tmp_path, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
        ) as processes:
            child = processes.start("sleeping", "script")
            running = psutil.Process(int(wait_for_output(child)))
            os.kill(os.getpid(), number)
            wait_for_end(child, processes)
    assert not running.is_running()
    assert signal.getsignal(number) == before
