"""`tandem up` starts both services, and leaves neither behind. Small programs stand for them here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

Up = Callable[..., "subprocess.Popen[str]"]

SERVICE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

NAME = {name!r}
for argument in sys.argv[1:]:
    flag, _, value = argument.partition("=")
    # One write: two programs share the pipe, and `print` writes a word at a time where nothing is buffered.
    sys.stdout.write(NAME + " " + argument + "\\n")
    sys.stdout.flush()
    if flag == "--addresses":
        address = value
if {dies!r} == "at once":
    sys.exit(7)
if {dies!r} == "loads for ever":
    time.sleep(600)
server = grpc.server(ThreadPoolExecutor(2))
servicer = health.HealthServicer()
servicer.set(NAME, health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port(address.replace("unix://", "unix:"))
server.start()
if {dies!r} == "later":
    time.sleep(1)
    sys.exit(7)
time.sleep(600)
"""
NAMES = {
    "inference_service": "tandem.inference.v1.InferenceService",
    "trainer_service": "tandem.trainer.v1.TrainingJobService",
}


@pytest.fixture
def up(folder: Path) -> Iterator[Up]:
    """Start `tandem up` where the services are the programs above. They end with the test in any case."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, dies: str = "", which: str = "") -> subprocess.Popen[str]:
        for module, name in NAMES.items():
            text = SERVICE.format(name=name, dies=dies if module == which else "")
            (folder / f"{module}.py").write_text(text)
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.cli", "up", *arguments],
            cwd=folder,
            env=os.environ | {"XDG_RUNTIME_DIR": str(folder), "RUNTIME_DIRECTORY": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def serving(process: subprocess.Popen[str]) -> tuple[list[str], list[psutil.Process]]:
    """What it wrote until both serve, and the services' processes."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("both serve"):
            return lines, psutil.Process(process.pid).children()
    raise AssertionError(f"it ended: {lines}")


def gone(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_serve_until_it_is_told_to_end(up: Up, folder: Path, number: signal.Signals) -> None:
    process = up("--model", "/m", "--engine", "a=1", "--engine", "b=2", "--trainer-config", "t.toml")
    lines, children = serving(process)
    inference, trainer = f"unix://{folder}/tandem-inference.sock", f"unix://{folder}/tandem-trainer.sock"
    said = {line for line in lines if line.startswith("tandem.")}
    assert said == {
        *(f"{NAMES['inference_service']} {flag}" for flag in ("--model=/m", "--engine=a=1", "--engine=b=2")),
        f"{NAMES['inference_service']} --addresses={inference}",
        f"{NAMES['trainer_service']} --addresses={trainer}",
        f"{NAMES['trainer_service']} --config=t.toml",
    }
    assert [line.split() for line in lines[-3:-1]] == [["inference", inference], ["trainer", trainer]]
    assert len(children) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; nothing is left running"
    gone(children)


@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("dies", ["at once", "later"])
def test_one_that_ends_takes_the_other_along(up: Up, which: str, dies: str) -> None:
    process = up(dies=dies, which=which)
    children = []
    with contextlib.suppress(AssertionError):
        children = serving(process)[1]
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert f"tandem: UNREACHABLE: {which} ended with code 7: its output above says why\n" in err
    gone(children)


def test_killed_it_leaves_nothing_either(up: Up) -> None:
    process = up()
    _, children = serving(process)
    process.kill()
    gone(children)


def test_services_that_do_not_serve_in_time_are_told_of(up: Up) -> None:
    # In which the other one has to serve, or it would be told of.
    process = up("--timeout", "6", dies="loads for ever", which="trainer_service")
    _, err = process.communicate(timeout=25)
    assert process.returncode == 1
    assert "tandem: DEADLINE: trainer did not serve within 6 s" in err
