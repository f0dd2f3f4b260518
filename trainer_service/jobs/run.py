"""`python -m trainer_service.jobs.run FOLDER ATTEMPT`: one attempt at a job. Starts what it needs, and ends it.

That is the training, and the inference service if the job has one of its own. This process loads neither: it waits for
them, and is what the trainer service watches. With - in place of FOLDER and ATTEMPT it has the training's process load
its libraries, and waits for a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_service.jobs.folder import FULL, JobFolder, Outcome, is_full
from trainer_service.jobs.processes import MARK, wait_any
from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.stopping import TOLD
from trainer_service.jobs.warm import LATER, Given, given

#: GPUs of the engine, where they are not the training's, by their names for CUDA.
ENGINE_GPUS = "TANDEM_JOB_ENGINE_GPUS"
_STOP_S = 15.0
#: The code that `tandem` commands end with where an argument is wrong: trying again does not help.
_WRONG = 2
#: Variables of Tandem's that the engine must not take for its settings.
_PREFIX = "TANDEM_"
_KEPT = (MARK,)
#: The rank that PEFT takes where none is given, and those that vLLM makes room for.
_PEFT_RANK = 8
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_UNBUFFERED = {"PYTHONUNBUFFERED": "1"}


class Attempt:
    """The processes of one attempt."""

    def __init__(self, folder: JobFolder, attempt: int, ready: subprocess.Popen[bytes] | None = None) -> None:
        """`ready` is a process that waits to be the training."""
        self._folder, self._attempt, self._ready = folder, attempt, ready
        self._spec = folder.spec()
        self._stopping = False
        self._engine_log_start = 0
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Do it. How it ended is told in the folder."""
        signal.signal(signal.SIGTERM, self._stop)
        self._folder.drop_incomplete()
        try:
            self._folder.reserve()
        except OSError as error:
            self._folder.tell_outcome(self._attempt, Outcome.FAILED, f"{FULL if is_full(error) else error}")
            return
        engine = self._start_engine() if self._spec.inference.managed is not None else None
        child = self._child = self._start_training()
        if self._stopping:  # told before there was one
            self._tell()
        started = [process for process in (child, engine) if process is not None]
        descriptors = [os.pidfd_open(process.pid) for process in started]
        wait_any(descriptors)
        if engine is not None and child.poll() is None and engine.poll() is not None:
            child.kill()
            child.wait()  # it may have all steps done, and tell so until then
            self._engine_ended(engine.returncode)
        code = child.wait()
        if engine is not None:
            _end(engine)
        self._folder.drop_incomplete()  # what is half written is of no use, and the disk may be full of it
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
            self._tell()

    def _tell(self) -> None:
        """Tell the training to end."""
        if not self._spec.hardware.launched:
            self._child.terminate()  # type: ignore[union-attr]  # it is there
            return
        # Not by a signal: the launcher would end the ranks, and each would hear it in another step.
        with contextlib.suppress(OSError):
            self._folder.stop_file(self._attempt).touch()
        os.write(2, TOLD)

    def _start_training(self) -> subprocess.Popen[bytes]:
        if self._ready is not None and self._ready.stdin is not None:
            own = {name: os.environ[name] for name in (MARK, "CUDA_VISIBLE_DEVICES")}
            job = Given(self._folder.path, self._attempt, own | dict(self._environment()))
            with contextlib.suppress(BrokenPipeError), self._ready.stdin as pipe:
                pipe.write(job.line())
            return self._ready  # if it has ended, that is seen as of any other
        return _spawn(self._training(), self._folder.output_file, os.environ | self._environment())

    def _training(self) -> list[str]:
        module = ["trainer_service.jobs.child", str(self._folder.path), str(self._attempt)]
        hardware = self._spec.hardware
        if not hardware.launched:
            return [sys.executable, "-m", *module]
        flags = [f"--num_processes={hardware.processes}", "--num_machines=1", "--main_process_port=0"]
        if hardware.accelerate_config is not None:
            flags.insert(0, f"--config_file={hardware.accelerate_config}")
        else:
            # On the CPU too: with its own flag for that, accelerate starts no more than one process.
            flags += ["--mixed_precision=no", "--dynamo_backend=no", "--multi_gpu"]
        return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", *module]

    def _environment(self) -> Mapping[str, str]:
        service = self._spec.inference.service
        if service is None:
            return {"TANDEM_INFERENCE_ADDRESS": f"unix://{self._folder.socket}", "TANDEM_INFERENCE_TOKEN": ""}
        given = {"TANDEM_INFERENCE_ADDRESS": ",".join(service.addresses)}
        if service.token_file is not None:
            given["TANDEM_INFERENCE_TOKEN"] = Path(service.token_file).read_text().strip()
        if service.ca_file is not None:
            given["TANDEM_INFERENCE_CA_FILE"] = service.ca_file
        return given

    def _start_engine(self) -> subprocess.Popen[bytes]:
        with contextlib.suppress(FileNotFoundError):
            self._engine_log_start = self._folder.engine_file.stat().st_size
        # What belongs to the service's own settings, a token or another model, is not the engine's.
        clean = {n: v for n, v in os.environ.items() if not n.startswith(_PREFIX) or n in _KEPT}
        if gpus := os.environ.get(ENGINE_GPUS):
            clean["CUDA_VISIBLE_DEVICES"] = gpus
        if self._folder.holds_sockets:  # vLLM removes none of its own
            clean.setdefault("VLLM_RPC_BASE_PATH", str(self._folder.path))
        return _spawn(engine_command(self._spec, self._folder), self._folder.engine_file, clean)

    def _engine_ended(self, code: int) -> None:
        with self._folder.engine_file.open("rb") as file:
            file.seek(self._engine_log_start)  # what is before is of other attempts
            lines = file.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("tandem: ")] or lines or ["it said nothing"]
        outcome = Outcome.FAILED if code == _WRONG else Outcome.DIED
        reason = f"its inference service ended with code {code}: {said[-1].removeprefix('tandem: ')}"
        # A training that misses its engine says no more than that.
        self._folder.tell_outcome(
            self._attempt, outcome, reason[:2000], over=set(Outcome) - {Outcome.SUCCEEDED}
        )


def engine_command(spec: JobSpec, folder: JobFolder) -> list[str]:
    """What starts the job's own inference service."""
    managed = spec.inference.managed
    engine = {} if managed is None else managed.engine
    flags = [f"--model={spec.model.path}", f"--addresses=unix://{folder.socket}", "--grace-s=0"]
    engine = (
        {"dtype": spec.model.dtype}
        | ({"revision": spec.model.revision} if spec.model.revision else {})
        | _adapter_options(spec)
        | engine
    )
    if spec.algorithm in ("nash_md", "xpo"):
        flags.append(f"--reference-model={spec.model.path}")
    return [sys.executable, "-m", "inference_service", *flags, f"--engine={json.dumps(engine)}"]


def _adapter_options(spec: JobSpec) -> dict[str, Any]:
    """What the engine needs for a policy's adapter beside its weights."""
    lora = spec.model.lora
    if lora is None or lora.mode != "adapter":
        return {}
    rank = lora.rank or _PEFT_RANK
    return {"enable_lora": True, "max_lora_rank": next((r for r in _VLLM_RANKS if r >= rank), rank)}


def _spawn(command: list[str], output: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment, **_UNBUFFERED},
            process_group=0,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()  # what it started, the trainer service ends
        process.wait()


def _stand_by() -> None:
    """Have a training load, and run it for the job that comes. Ends with the service, or with the training."""
    ready = subprocess.Popen(
        [sys.executable, "-m", "trainer_service.jobs.child", LATER],
        stdin=subprocess.PIPE,
        env=os.environ | _UNBUFFERED,
        process_group=0,
    )
    wait_any([0, os.pidfd_open(ready.pid)])
    job = given() if ready.poll() is None else None
    if job is not None:
        Attempt(JobFolder(job.folder), job.attempt, ready).run()
    else:
        ready.kill()
        ready.wait()


if __name__ == "__main__":
    if sys.argv[1] == LATER:
        _stand_by()
    else:
        Attempt(JobFolder(Path(sys.argv[1])), int(sys.argv[2])).run()
