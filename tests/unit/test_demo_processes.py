"""The demo ends what it started, whatever that does about it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from examples.demo.processes import Child, ChildError, Interrupted, Processes

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
    monkeypatch.setattr("examples.demo.processes.GRACE_S", 0.2)
    with Processes(tmp_path, module(tmp_path, STUBBORN)) as processes:
        child = processes.start("stubborn", "script")
        grandchild = psutil.Process(int(wait_for_output(child)))
        assert grandchild.is_running()
    grandchild.wait(5)


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
