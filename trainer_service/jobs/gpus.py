"""The host's GPUs, given out whole."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence

from tandem.errors import Violation
from trainer_service.jobs.spec import JobSpec


def found() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def needed(spec: JobSpec, there: Sequence[str]) -> tuple[int, int]:
    """How many the training needs on this host, and how many the job's engine beside it."""
    hardware, managed = spec.hardware, spec.inference.managed
    training = hardware.gpus if hardware.gpus is not None else hardware.processes if there else 0
    return 0 if hardware.cpu else training, managed.gpus if managed is not None else 0


def lacking(spec: JobSpec, there: Sequence[str]) -> list[Violation]:
    """What is wrong with a job that no waiting would get the GPUs for."""
    training, engine = needed(spec, there)
    if training + engine <= len(there):
        return []
    field = "job.inference.managed.gpus"
    if training > len(there):  # with or without an engine
        field = "job.hardware.processes" if spec.hardware.gpus is None else "job.hardware.gpus"
    return [Violation(field, f"the job needs {training + engine} GPUs, and the host has {len(there)}")]


def chosen(spec: JobSpec, there: Sequence[str], taken: Iterable[str]) -> tuple[str, ...] | None:
    """GPUs for a job, the training's first, or None while there are too few."""
    training, engine = needed(spec, there)
    used = set(taken)
    free = [gpu for gpu in there if gpu not in used]
    return tuple(free[: training + engine]) if training + engine <= len(free) else None
