"""Jobs for tests: small, and whole enough to be taken."""

from __future__ import annotations

from typing import Any

from trainer_service.jobs.reading import read
from trainer_service.jobs.spec import JobSpec


def table(**fields: Any) -> dict[str, Any]:
    """A job's table, with other fields in place of its own."""
    return {
        "model": {"path": "/models/tiny"},
        "dataset": {"json_lines": "/data/prompts.jsonl"},
        "rewards": [{"function": "rewards:score"}],
        "inference": {"managed": {}},
        "training": {"max_steps": 2},
        "grpo": {"num_generations": 4},
    } | fields


def spec(**fields: Any) -> JobSpec:
    return read(table(**fields))
