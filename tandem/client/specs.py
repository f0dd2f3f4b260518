"""Job files: TOML or JSON whose names are the contract's, one to one."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.client.tables import clear, merge, message
from tandem.errors import invalid
from tandem.trainer.v1.job_pb2 import JobSpec

Spec = JobSpec | Mapping[str, Any] | str | Path
"""A job: the contract's message, its table, or a file of either TOML or JSON."""


def job_spec(given: Spec, changes: Mapping[str, Any] | None = None) -> JobSpec:
    """The job that is meant.

    Args:
        given: a message, a table, or the path of a file: `.json` is JSON, all else TOML.
        changes: what the job shall have else, by paths of fields. Tables add to what is there, lists replace it, and
            None removes it; where one of several goes, such as the source of a dataset, the new one takes the old
            one's place.

    Raises:
        InvalidArgument: the file cannot be read, or names what the contract does not have; by the path in it.

    >>> table = {"model": {"path": "/models/policy"}, "training": {"max_steps": 8}, "grpo": {}}
    >>> spec = job_spec(table, {"training.max_steps": 2, "training.seed": 1})
    >>> spec.training.max_steps, spec.training.seed, spec.WhichOneof("algorithm")
    (2, 1, 'grpo')
    """
    spec = _given(given)
    if not changes:
        return spec
    changed = JobSpec()
    changed.CopyFrom(spec)
    for path, value in changes.items():
        table = value
        for name in reversed(path.split(".")):
            table = {name: table}
        new = message(JobSpec, table, "job")
        clear(changed, table)  # a message cannot tell an empty list from none
        merge(changed, new)
    return changed


def _given(given: Spec) -> JobSpec:
    if isinstance(given, JobSpec):
        return given
    if isinstance(given, Mapping):
        return message(JobSpec, given, "job")
    if not isinstance(given, str | Path):
        raise TypeError(f"a job is a JobSpec, a table or a path, not {type(given).__name__}")
    return message(JobSpec, _table(Path(given)), "job")


def _table(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode()
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise invalid("job", f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # TOML's, JSON's and UTF-8's errors
        raise invalid("job", f"cannot read {path}: {error}") from error
    if not isinstance(table, dict):
        raise invalid("job", f"{path} holds no table")
    return table
