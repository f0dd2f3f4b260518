"""The examples, as a newcomer runs them, with a tiny model and few steps."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.weights.v1 import weights_pb2
from tests.job_service import Place, end_jobs, job_service
from tests.services import ENVIRONMENT, Service, inference_service
from trainer_service.jobs.spec import ALGORITHMS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """The tiny Llama with itself as the reference, which is what jobs and scripts take for one."""
    model = checkpoints["llama"]
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(
            model, Path(folder), f"--reference-model={model}", max_num_seqs="64"
        ) as service:
            yield service


@pytest.fixture(scope="module")
def trainer(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A trainer service's address."""
    place = Place(tmp_path_factory.mktemp("jobs"), checkpoints["llama"])
    with tempfile.TemporaryDirectory(prefix="tdj") as folder:
        with job_service(Path(folder), place) as service:
            yield service.address
        end_jobs(Path(folder))


def test_every_algorithm_has_a_job_file_and_a_script() -> None:
    assert {path.stem for path in (EXAMPLES / "jobs").iterdir()} == set(ALGORITHMS)
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ALGORITHMS, "quickstart", "learning"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_job_file_is_submitted(
    algorithm: str, trainer: str, engine: Service, checkpoints: dict[str, Path]
) -> None:
    """GRPO's as the README has it, with an engine of its own; the others train on one that is there."""
    command = f"submit examples/jobs/{algorithm}.toml --watch"
    changes = {"model.path": str(checkpoints["llama"]), "training.max_steps": 2, "training.save_steps": 1}
    if algorithm == "grpo":
        assert f"\n    .venv/bin/tandem {command}" in (ROOT / "README.md").read_text()
    else:
        changes["inference.service.addresses"] = [engine.address]
    before = version(engine)
    flags = [f"--set={path}={json.dumps(value)}" for path, value in changes.items()]
    lines = run("-m", "tandem.cli", *command.split(), *flags, TANDEM_TRAINER_ADDRESS=trainer).splitlines()
    assert lines[-1].endswith("SUCCEEDED"), "\n".join(lines)
    assert re.findall(r"step (\d/\d) reward", "\n".join(lines)) == ["1/2", "2/2"]
    # The policy as it is when the trainer comes, and two steps.
    assert version(engine) == before + (0 if algorithm == "grpo" else 3)


# TRL, transformers and accelerate warn of themselves.
@pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|torch|datasets)")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_is_run(
    algorithm: str,
    engine: Service,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, which has loaded TRL."""
    before = version(engine)
    script = str(EXAMPLES / f"{algorithm}.py")
    flags = [f"--model={checkpoints['llama']}", f"--address={engine.address}", "--steps=2"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    trainer.close()
    assert version(engine) == before + 3
    # torch-optimi would take triton's kernels on a CPU too, where triton is installed.
    assert {group["triton"] for group in trainer.optimizer.param_groups} == {False}
    assert [step for step in trainer.state.log_history if "loss" in step][-1]["step"] == 2


def run(*command: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run Python to its end. What it wrote."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def version(service: Service) -> int:
    """The engine's weight version."""
    request = weights_pb2.GetWeightVersionRequest()
    return int(service.weights.GetWeightVersion(request, timeout=10).weight_version)
