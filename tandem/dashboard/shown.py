"""What the page gets: jobs, events and errors as JSON, with text cut to lengths that a page can show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from tandem.client import (
    AsyncJob,
    Checkpoint,
    CheckpointSaved,
    Event,
    Log,
    Metrics,
    Sample,
    Samples,
    StateChange,
)
from tandem.errors import TandemError

_TEXT = 4000  # characters of a prompt, a completion or a reason
_LINE = 2000
_NAME = 120
_FIGURES = 100  # of one step
_SAMPLES = 8  # of one step


def job(job: AsyncJob) -> dict[str, Any]:
    """A job as the list and its own page show it."""
    times = {name: getattr(job, name) for name in ("create_time", "start_time", "end_time")}
    return {
        "id": job.id,
        "state": job.state,
        "reason": _cut(job.reason, _TEXT),
        "algorithm": job.algorithm,
        "model": _cut(job.spec.model.path, _TEXT),
        "step": job.step,
        "max_steps": job.max_steps,
        "attempt": job.attempt,
        "labels": {_cut(key, _NAME): _cut(value, _NAME) for key, value in job.spec.labels.items()},
        "folder": job.folder,
        "gpus": list(job.gpus),
    } | {name: time.isoformat() if time else None for name, time in times.items()}


def event(event: Event) -> tuple[str, dict[str, Any]]:
    """The name of an event's kind, and what the page gets of it."""
    head = {"sequence": event.sequence, "time": event.time.isoformat(), "attempt": event.attempt}
    match event:
        case StateChange():
            reason = _cut(event.reason, _TEXT)
            return "state", head | {"old_state": event.old_state, "state": event.state, "reason": reason}
        case Metrics():
            where = {"step": event.step, "max_steps": event.max_steps, "epoch": event.epoch}
            return "metrics", head | where | {"values": _figures(event.values)}
        case Samples():
            few = [_sample(sample) for sample in event.samples[:_SAMPLES]]
            return "samples", head | {"step": event.step, "samples": few}
        case Log():
            return "log", head | {"text": _cut(event.text, _LINE)}
        case CheckpointSaved():
            return "checkpoint", head | _checkpoint(event.checkpoint)
    return "other", head


def error(error: TandemError) -> dict[str, Any]:
    """An error: reason, message, and each field at fault."""
    fields = [{"field": v.field, "description": v.description} for v in error.violations]
    return {
        "code": error.code_name,
        "reason": str(error.reason),
        "message": error.message,
        "violations": fields,
    }


def encode(value: Any) -> str:
    """JSON in one line. Figures that are no finite number have been made text by then: JSON has none."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _sample(sample: Sample) -> dict[str, Any]:
    advantage = None if sample.advantage is None else _number(sample.advantage)
    return {
        "prompt": _cut(sample.prompt, _TEXT),
        "completion": _cut(sample.completion, _TEXT),
        "rewards": _figures(sample.rewards),
        "advantage": advantage,
        "weight_version": sample.weight_version,
    }


def _checkpoint(saved: Checkpoint) -> dict[str, Any]:
    return {"step": saved.step, "path": saved.path, "bytes": saved.bytes}


def _figures(values: Mapping[str, float]) -> dict[str, float | str]:
    return {_cut(name, _NAME): _number(values[name]) for name in sorted(values)[:_FIGURES]}


def _number(value: float) -> float | str:
    """What JavaScript's Number() takes for the same number."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
