"""A process that is there before its job: what it loads, and how it becomes a process of the job that it is given.

One line of JSON on standard input is the job. Where the input ends without one, nobody needs the process any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer_service.jobs.folder import JobFolder
from trainer_service.jobs.processes import MARK

#: In place of the folder and the attempt on a command line: they come later.
LATER = "-"
#: Asks the driver's library for GPUs in place of the driver, which would then know of no other GPUs than it finds now.
_LOOK_ONLY = "PYTORCH_NVML_BASED_CUDA_CHECK"
_NOT_INITIALIZED = 3  # CUDA's error
_ROOM = 64  # for the name of a job's folder


@dataclass(frozen=True, slots=True)
class Given:
    """A job for a process that waits."""

    folder: Path
    attempt: int
    environment: Mapping[str, str]
    """What is other than in the process's environment. The mark is in it."""

    def line(self) -> bytes:
        told = {"folder": str(self.folder), "attempt": self.attempt, "environment": dict(self.environment)}
        return json.dumps(told).encode() + b"\n"


def environment(root: Path) -> dict[str, str]:
    """What a process that waits for a job in one of the folders under `root` needs in its environment.

    Its mark until then is its own, and has room for the job's.
    """
    return {
        MARK: f"{root}/standby-{secrets.token_hex(6)}".ljust(len(str(root)) + _ROOM, "-"),
        _LOOK_ONLY: "1",
    }


def given() -> Given | None:
    """Wait for a job; None where there will be none. From then on this process is the job's, and its output too."""
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return None
    told = json.loads(line)
    found = Given(Path(told["folder"]), told["attempt"], told["environment"])
    os.environ.pop(_LOOK_ONLY, None)
    os.environ.update(found.environment)
    _show(MARK, found.environment[MARK])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    output = os.open(JobFolder(found.folder).output_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    importlib.invalidate_caches()  # a module of the user's may be newer than this process
    return found


def load() -> None:
    """Import all that a training may need, which takes most of the time of its start. What cannot be imported is told
    by the job that needs it."""
    for name in (
        "torch._dynamo",  # torch's optimizers do
        "torch.distributed.tensor",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.qwen3.modeling_qwen3",
        "datasets",
        "peft",
        "trainer_service._trl",
        "trainer_service._trl_experimental",
        "trainer_service.trainers.grpo",
        "trainer_service.trainers.rloo",
        "trainer_service.trainers.online_dpo",
        "trainer_service.trainers.nash_md",
        "trainer_service.trainers.xpo",
        "trainer_service.rewards",
        "trainer_service.jobs.build",
        "trainer_service.jobs.report",
        "weight_transfer.transports",
    ):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    with contextlib.suppress(Exception):  # some hundred patterns, compiled once
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]
    gc.collect()
    gc.freeze()  # else trainers, which collect when they begin, look through all of this again


def knows_gpus() -> bool:
    """Whether something in this process has CUDA initialized: then it does not heed CUDA_VISIBLE_DEVICES any more."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    context = ctypes.c_void_p()
    return bool(driver.cuCtxGetCurrent(ctypes.byref(context)) != _NOT_INITIALIZED)


def _show(name: str, value: str) -> None:
    """Have /proc show another value of a variable, in the place that `environment` has kept for it.

    The kernel shows what a process was started with, where that lies in its memory.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    held = ctypes.string_at(start, end - start)
    place = (b"\0" + held).find(f"\0{name}=".encode())
    if place < 0:
        raise RuntimeError(f"the process was started without {name}")
    room = held.index(b"\0", place) - place
    entry = f"{name}={value}".encode()
    if len(entry) > room:
        raise RuntimeError(f"{name} was started with less room than {value!r} needs")
    ctypes.memmove(start + place, entry.ljust(room, b"\0"), room)
