"""Jobs through the client and the command, with both real services: what the guides show is what runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.client import (
    CheckpointSaved,
    JobState,
    Log,
    Metrics,
    Samples,
    StateChange,
    TandemClient,
    job_spec,
)
from tandem.weights.v1 import weights_pb2
from tests.job_service import Place, end_jobs, job_service
from tests.services import Service

DOCS = Path(__file__).parents[2] / "docs"
REWARD = """
def score(completions, **_):
    return [float(len(set(text)) % 5) for text in completions]
"""


class Trainer:
    """A trainer service that may be killed and started again."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self._place = folder, place
        self._running = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self.service = self._running.enter_context(job_service(self.folder, self._place))
        self.address = self.service.address

    def stop(self) -> None:
        self._running.close()
        end_jobs(self.folder)


@pytest.fixture(scope="module")
def trainer(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    parts = Place(tmp_path_factory.mktemp("jobs"), checkpoints["llama"])
    (parts.folder / "rewards.py").write_text(REWARD)
    with tempfile.TemporaryDirectory(prefix="tdm") as name:
        trainer = Trainer(Path(name), parts)
        yield trainer
        trainer.stop()


@pytest.fixture
def place(
    trainer: Trainer,
    llama: Service,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A folder with a job.toml for the tiny model, and the services' addresses in the environment."""
    rows = [json.dumps({"prompt": f"What is {n} + 1?"}) for n in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    text = (DOCS / "cli.md").read_text().partition("```toml\n")[2].partition("```")[0]
    managed = re.search(r"\[inference\.managed\.engine\].*?\n\n", text, re.DOTALL)
    assert managed is not None
    for old, new in {
        "/models/policy": str(checkpoints["llama"]),
        "/data/prompts.jsonl": str(tmp_path / "prompts.jsonl"),
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "managed.toml").write_text(text)
    there = f'[inference.service]\naddresses = ["{llama.address}"]\n\n'
    (tmp_path / "job.toml").write_text(text.replace(managed[0], there))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANDEM_TRAINER_ADDRESS", trainer.address)
    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", llama.address)
    yield tmp_path
    llama.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tandem.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_guide_of_the_client_is_true(place: Path) -> None:
    """Each of its examples, in the order of the page."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "sdk.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "docs/sdk.md", "exec"), {})  # noqa: S102  # ours
        assert out.getvalue() or "assert" in block


def test_the_command_and_the_client_follow_a_job_over_a_restart_of_the_service(
    place: Path, trainer: Trainer
) -> None:
    checked = tandem("submit", "--check", "managed.toml")
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "it would be taken\n", "")
    submitted = tandem("submit", "job.toml")
    assert (submitted.returncode, submitted.stderr) == (0, "")
    job_id = submitted.stdout.strip()
    watch = subprocess.Popen(
        [sys.executable, "-m", "tandem.cli", "watch", job_id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watch.stdout is not None
    lines = [watch.stdout.readline()]  # it follows: from now on it must get over what happens
    events = []
    with TandemClient() as client:
        job = client.job(job_id)
        assert job.spec.model.path == job_spec("job.toml").model.path
        for event in job.watch(timeout_s=120):
            events.append(event)
            if isinstance(event, StateChange) and event.state is JobState.STARTING:
                trainer.service.kill()  # which the job does not notice
                trainer.start()
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert {StateChange, Metrics, Samples, Log, CheckpointSaved} == {type(event) for event in events}
        assert job.attempt == 1
        saved = job.result(10)
        assert saved is not None
        assert (saved.step, job.step, job.max_steps) == (2, 2, 2)
        assert (Path(saved.path) / "model.safetensors").is_file()

    out, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (0, "")
    lines += out.splitlines()
    assert len(lines) >= len(events)
    assert lines[-1].endswith("SUCCEEDED")
    assert [
        line for line in lines if " step 2/2 reward " in line and "tokens/s" in line and "sync ms" in line
    ]

    row = tandem("jobs", "--label", "team=alpha", "--state", "succeeded").stdout.splitlines()[1]
    assert row.split()[:4] == [job_id, "SUCCEEDED", "grpo", "2/2"]
    logs = tandem("logs", job_id)
    assert logs.stdout.splitlines() == [
        line.partition(" log ")[2] for line in lines if re.match(r"\S+ log ", line)
    ]
    plotted = tandem("plot", job_id)
    assert (plotted.returncode, plotted.stdout) == (0, f"{job_id}.png\n")
    assert (place / f"{job_id}.png").read_bytes().startswith(b"\x89PNG")
    assert tandem("delete", job_id).stdout == f"{job_id} deleted\n"
    gone = tandem("watch", job_id)
    assert gone.returncode == 1
    assert gone.stderr.startswith("tandem: JOB_NOT_FOUND")
    assert not Path(saved.path).exists()


def test_what_the_service_refuses_is_told_by_its_path(place: Path) -> None:
    table = tomllib.loads((place / "job.toml").read_text())
    table["dataset"]["json_lines"] = "/none.jsonl"
    (place / "wrong.json").write_text(json.dumps(table))
    done = tandem("submit", "wrong.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tandem: FIELD_INVALID: job.dataset.json_lines")
