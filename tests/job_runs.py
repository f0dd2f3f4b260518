"""Jobs of each algorithm, and what they did: enough to tell whether two were the same bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from tandem.trainer.v1 import job_pb2
from tests.job_service import JobService, Place
from trainer_service.jobs.account import History, history
from trainer_service.jobs.folder import JobFolder

#: Each with its own settings: rollouts that later steps need, where there are such, and several epochs.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 4, "num_iterations": 2, "steps_per_generation": 2},
    "rloo": {"num_generations": 2, "steps_per_generation": 2},
    "online_dpo": {},
    "nash_md": {"mixture_coef": 0.3},
    "xpo": {"alpha": 0.1},
}
STEPS = 7
#: Checkpoints are not where a generation ends.
SAVE_STEPS = 3
_PROMPTS = ["ab", "cde", "x", "yy", "zq z", "longer than the others", "q", "ba"]
#: Figures that two runs never have in common: of time, and of bytes that a session's first update moves.
_OF_TIME = ("_ms", "_time", "per_second", "bytes_moved", "runtime", "gpu_memory")


@dataclass(frozen=True)
class Run:
    """What a job did: its account, the figures of each step, and the digest of its last checkpoint's weights."""

    account: History
    figures: dict[int, dict[str, float]]
    digest: str

    @property
    def sampled(self) -> list[tuple[Any, ...]]:
        """Step by step the rollouts that were generated and trained on, whatever the engine's versions were."""
        return [
            (
                line["step"],
                [(group["group"], group["rollouts"]) for group in line["generated"]],
                line["trained"],
            )
            for line in self.account.steps[0]
        ]

    def figures_without(self, *names: str) -> dict[int, dict[str, float]]:
        return {
            step: {name: value for name, value in values.items() if name not in names}
            for step, values in self.figures.items()
        }


def spec(place: Place, algorithm: str, address: str | None, **training: Any) -> job_pb2.JobSpec:
    """A job of several epochs over few prompts."""
    (place.folder / "few.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in _PROMPTS))
    given = json_format.MessageToDict(place.spec(address), preserving_proto_field_name=True)
    del given["grpo"]
    given |= {algorithm: ALGORITHMS[algorithm], "dataset": {"json_lines": str(place.folder / "few.jsonl")}}
    given["training"] |= {
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "per_device_train_batch_size": 4,
    } | training
    return json_format.ParseDict(given, job_pb2.JobSpec())


def read(service: JobService, job_id: str) -> Run:
    """What a job did that has succeeded."""
    folder = JobFolder(Path(service.get(job_id).folder))
    figures: dict[int, dict[str, float]] = {}
    for event in service.watch(job_id):
        if "loss" in event.metrics.values:  # a step that was done anew is told of again
            values = dict(event.metrics.values)
            figures[event.metrics.step] = {
                name: value for name, value in values.items() if not any(part in name for part in _OF_TIME)
            }
    weights = (folder.checkpoints()[-1].path / "model.safetensors").read_bytes()
    return Run(history(folder.path), figures, hashlib.sha256(weights).hexdigest())


def running(service: JobService, job_id: str, module: str) -> list[int]:
    """A job's processes that run `module`."""
    found = []
    for pid in service.members(job_id):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def killed(service: JobService, job_id: str, module: str) -> bool:
    """SIGKILL to a job's process that runs `module`, if there is one."""
    for pid in running(service, job_id, module):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False
