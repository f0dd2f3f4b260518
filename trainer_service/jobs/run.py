"""`python -m trainer_service.jobs.run FOLDER ATTEMPT`: one attempt at a job. Starts what it needs, and ends it.

That is the training, and the inference service if the job has one of its own. This process loads neither: it waits for
them, and is what the trainer service watches.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_service.jobs.folder import JobFolder, Outcome
from trainer_service.jobs.processes import wait_any
from trainer_service.jobs.spec import JobSpec

#: GPUs of the engine, where they are not the training's, by their names for CUDA.
ENGINE_GPUS = "TANDEM_JOB_ENGINE_GPUS"
_STOP_S = 15.0
#: The code that `tandem` commands end with where an argument is wrong: trying again does not help.
_WRONG = 2
#: Variables of Tandem's that the engine must not take for its settings.
_PREFIX = "TANDEM_"
_KEPT = ("TANDEM_JOB",)


class Attempt:
    """The processes of one attempt."""

    def __init__(self, folder: JobFolder, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._spec = folder.spec()
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Do it. How it ended is told in the folder."""
        signal.signal(signal.SIGTERM, self._stop)
        self._folder.drop_incomplete()
        engine = self._start_engine() if self._spec.inference.managed is not None else None
        child = _spawn(self._training(), self._folder.output_file, os.environ | self._environment())
        self._child = child
        if self._stopping:  # told before there was one
            child.terminate()
        started = [process for process in (child, engine) if process is not None]
        descriptors = [os.pidfd_open(process.pid) for process in started]
        wait_any(descriptors)
        if engine is not None and child.poll() is None and engine.poll() is not None:
            self._engine_ended(engine.returncode)
            child.kill()
        code = child.wait()
        if engine is not None:
            _end(engine)
        if code < 0 and not self._stopping:
            why = f"its training was killed by {signal.Signals(-code).name}"
            self._folder.tell_outcome(self._attempt, Outcome.DIED, why)
        elif self._stopping:
            self._folder.tell_outcome(self._attempt, Outcome.STOPPED)
        else:
            self._folder.tell_outcome(self._attempt, Outcome.DIED, f"its training ended with code {code}")

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True
        if self._child is not None and self._child.returncode is None:
            self._child.terminate()

    def _training(self) -> list[str]:
        module = ["trainer_service.jobs.child", str(self._folder.path), str(self._attempt)]
        hardware = self._spec.hardware
        if hardware.processes == 1 and hardware.accelerate_config is None:
            return [sys.executable, "-m", *module]
        flags = [f"--num_processes={hardware.processes}", "--num_machines=1", "--main_process_port=0"]
        if hardware.accelerate_config is not None:
            flags.insert(0, f"--config_file={hardware.accelerate_config}")
        else:
            flags += ["--mixed_precision=no", "--dynamo_backend=no"]
            flags += ["--multi_gpu"] if os.environ.get("CUDA_VISIBLE_DEVICES") else ["--cpu"]
        return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", *module]

    def _environment(self) -> Mapping[str, str]:
        service = self._spec.inference.service
        if service is None:
            return {"TANDEM_INFERENCE_ADDRESS": f"unix://{self._folder.socket}", "TANDEM_INFERENCE_TOKEN": ""}
        given = {"TANDEM_INFERENCE_ADDRESS": service.addresses[0]}
        if service.token_file is not None:
            given["TANDEM_INFERENCE_TOKEN"] = Path(service.token_file).read_text().strip()
        if service.ca_file is not None:
            given["TANDEM_INFERENCE_CA_FILE"] = service.ca_file
        return given

    def _start_engine(self) -> subprocess.Popen[bytes]:
        # What belongs to the service's own settings, a token or another model, is not the engine's.
        clean = {n: v for n, v in os.environ.items() if not n.startswith(_PREFIX) or n in _KEPT}
        if gpus := os.environ.get(ENGINE_GPUS):
            clean["CUDA_VISIBLE_DEVICES"] = gpus
        return _spawn(engine_command(self._spec, self._folder), self._folder.engine_file, clean)

    def _engine_ended(self, code: int) -> None:
        lines = self._folder.engine_file.read_text(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("tandem: ")] or lines or ["it said nothing"]
        outcome = Outcome.FAILED if code == _WRONG else Outcome.DIED
        reason = f"its inference service ended with code {code}: {said[-1].removeprefix('tandem: ')}"
        self._folder.tell_outcome(self._attempt, outcome, reason[:2000], again=True)


def engine_command(spec: JobSpec, folder: JobFolder) -> list[str]:
    """What starts the job's own inference service."""
    managed = spec.inference.managed
    engine = {} if managed is None else managed.engine
    flags = [f"--model={spec.model.path}", f"--addresses=unix://{folder.socket}", "--grace-s=0"]
    engine = (
        {"dtype": spec.model.dtype}
        | ({"revision": spec.model.revision} if spec.model.revision else {})
        | engine
    )
    if spec.algorithm in ("nash_md", "xpo"):
        flags.append(f"--reference-model={spec.model.path}")
    return [sys.executable, "-m", "inference_service", *flags, f"--engine={json.dumps(engine)}"]


def _spawn(command: list[str], output: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # what it started, the trainer service ends
        process.wait()


if __name__ == "__main__":
    Attempt(JobFolder(Path(sys.argv[1])), int(sys.argv[2])).run()
