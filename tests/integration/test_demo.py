"""The demo, as its user runs it, with a tiny model: what it leaves in its folder, and that nothing is left running."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from examples.demo.tasks import Tasks, reward, score

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Everything that was started below this process has ended, also what lost its parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0  # orphans become our children
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    try:
        left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        left = psutil.wait_procs(left, timeout=10)[1]  # what ends by itself may need a moment
        alive = [child.cmdline() for child in left if child.status() != psutil.STATUS_ZOMBIE]
        assert not alive
    finally:
        for child in left:
            child.kill()
            os.waitpid(child.pid, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Demo:
    """A running demo."""

    def __init__(self, model: Path, folder: Path, sockets: Path, steps: int) -> None:
        self.folder, self.sockets, self.log = folder, sockets, folder / "demo.log"
        folder.mkdir()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "examples.demo",
                    f"--model={model}",
                    f"--out={folder}",
                    f"--steps={steps}",
                ],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(sockets), "COLUMNS": "200"},
                stdout=log,
                stderr=log,
            )

    def steps(self) -> list[tuple[int, int]]:
        """The steps that it has told of, each with its weight version."""
        found = re.findall(r"step (\d+)/\d+ reward .*tokens/s .*weight version (\d+)\n", self.log.read_text())
        return [(int(step), int(version)) for step, version in found]

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait for something that it does."""
        end = time.monotonic() + 400
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def child(self, module: str) -> psutil.Process:
        """Its child that runs `module`."""
        (found,) = (c for c in psutil.Process(self.process.pid).children() if module in c.cmdline())
        return found

    def wait(self) -> int:
        """Wait for its end, and see that its scratch files, with its job, are gone. Its exit code."""
        code = self.process.wait(400)
        assert not list(self.sockets.iterdir())
        return code


@pytest.mark.usefixtures("nothing_left")
def test_three_steps(checkpoints: dict[str, Path], tmp_path: Path, socket_folder: Path) -> None:
    demo = Demo(checkpoints["llama"], tmp_path / "demo", socket_folder, steps=3)
    assert demo.wait() == 0, demo.log.read_text()

    summary = json.loads((demo.folder / "summary.json").read_text())
    assert {"reward_before", "reward_after", "steps", "seconds", "sync_ms_p50"} <= set(summary)
    assert 0 <= summary["reward_before"] <= 1
    assert 0 <= summary["reward_after"] <= 1
    assert summary["steps"] == 3
    assert 0 < summary["sync_ms_p50"] < 1e3 * summary["seconds"]
    assert summary["transport"] == "shared"
    assert summary["aliased"] is True
    # Only the first update, which brings the trainer's weights, moves any.
    assert summary["bytes_moved_per_sync"] == 0
    weights = load_file(checkpoints["llama"] / "model.safetensors")
    assert summary["bytes_moved_first"] == sum(tensor.nbytes for tensor in weights.values())
    # The checkpoint is version 1, the first update 2, and each step one more.
    assert demo.steps() == [(1, 3), (2, 4), (3, 5)]
    assert summary["weight_version"] == 5
    assert (demo.folder / "reward.png").read_bytes().startswith(b"\x89PNG\r\n")
    said = demo.log.read_text()
    assert said.index("before:") < said.index("tokens/s") < said.index("after:") < said.index("moves 0 bytes")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("when", ["it loads", "it trains"])
def test_interrupted(checkpoints: dict[str, Path], tmp_path: Path, socket_folder: Path, when: str) -> None:
    demo = Demo(checkpoints["llama"], tmp_path / "demo", socket_folder, steps=10_000)
    number = signal.SIGTERM if when == "it loads" else signal.SIGINT
    demo.wait_until(
        (demo.folder / "trainer.log").exists if when == "it loads" else lambda: len(demo.steps()) > 1
    )
    demo.process.send_signal(number)
    assert demo.wait() == 130, demo.log.read_text()
    assert f"stopped by {number.name}" in demo.log.read_text()
    assert not (demo.folder / "summary.json").exists()


@pytest.mark.usefixtures("nothing_left")
def test_the_services_die(checkpoints: dict[str, Path], tmp_path: Path, socket_folder: Path) -> None:
    """Its job would outlive them."""
    demo = Demo(checkpoints["llama"], tmp_path / "demo", socket_folder, steps=10_000)
    demo.wait_until(lambda: bool(demo.steps()))
    services = [demo.child(name) for name in ("inference_service", "trainer_service")]
    theirs = [child for service in services for child in service.children(recursive=True)]
    for service in services:
        service.kill()
    assert demo.wait() == 1, demo.log.read_text()
    # What only waits for a service ends by itself, a moment later.
    assert not psutil.wait_procs(theirs, timeout=60)[1]
    assert "_service ended with code -9" in demo.log.read_text()
    assert not (demo.folder / "summary.json").exists()


def test_what_is_held_out_is_never_trained_on() -> None:
    tasks = Tasks(seed=7)
    assert len(tasks.held_out) == 64
    assert len({*tasks.held_out, *tasks.training}) == len(tasks.held_out) + len(tasks.training) == 187
    assert tasks.held_out == Tasks(seed=7).held_out != Tasks(seed=8).held_out


@pytest.mark.parametrize(
    ("completion", "earned"),
    [("14", 1), ("5 + 9 = 14.", 1), ("14, or 15", 0), ("It is 114", 2 / 3), ("fourteen", 0), ("", 0)],
)
def test_the_last_number_counts(completion: str, earned: float) -> None:
    assert score(completion, "14") == pytest.approx(earned)
    assert reward([[{"role": "assistant", "content": completion}]], answer=["14"]) == [pytest.approx(earned)]
