"""A job's specification from what a user gave, with each fault told by its field's path."""

from __future__ import annotations

import difflib
from typing import Any, get_args

import pydantic

from tandem.errors import InvalidArgument, Reason, Violation, invalid
from trainer_service.jobs.spec import (
    ALGORITHMS,
    PAIRWISE,
    Algorithm,
    Grpo,
    JobSpec,
    NashMd,
    OnlineDpo,
    Part,
    Rloo,
    Table,
    Training,
    Xpo,
)


def read(given: Table, prefix: str = "job") -> JobSpec:
    """The job of a table, such as a job file's.

    Raises:
        InvalidArgument: names each field at fault by its path, under `prefix`.
    """
    try:
        spec = JobSpec.model_validate(given)
    except pydantic.ValidationError as error:
        raise _refusal(error, prefix) from None
    violations = list(_conflicts(spec, prefix))
    if violations:
        raise refusal(violations)
    return spec


def refusal(violations: list[Violation]) -> InvalidArgument:
    """The error that lists them all."""
    if len(violations) == 1:
        return invalid(violations[0].field, violations[0].description)
    first = violations[0]
    return InvalidArgument(
        Reason.FIELD_INVALID,
        f"{first.field}: {first.description}, and {len(violations) - 1} more",
        violations=violations,
    )


def _conflicts(spec: JobSpec, prefix: str) -> list[Violation]:
    found = []
    if spec.algorithm not in PAIRWISE:
        found += [
            Violation(f"{prefix}.rewards[{index}].judge", f"{spec.algorithm} has no pairs for a judge")
            for index, reward in enumerate(spec.rewards)
            if reward.judge is not None
        ]
    elif any(reward.judge is not None for reward in spec.rewards) and len(spec.rewards) > 1:
        found.append(Violation(f"{prefix}.rewards", "a judge is the only one where there is one"))
    hardware = spec.hardware
    if hardware.cpu and hardware.gpus:
        found.append(Violation(f"{prefix}.hardware.gpus", "a training on the CPU has none"))
    if spec.training.max_steps is None and spec.training.num_train_epochs is None:
        found.append(Violation(f"{prefix}.training", "one of max_steps and num_train_epochs is needed"))
    return found


def _refusal(error: pydantic.ValidationError, prefix: str) -> InvalidArgument:
    violations = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        text = " ".join(one["msg"].removeprefix("Value error, ").split())
        where = one["loc"]
        if where[-1:] == ("[key]",):  # of a map, whose name is the one at fault
            text, where = f"the name {where[-2]!r}: {text}", where[:-2]
        path = prefix
        for part in where:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
        if one["type"] == "extra_forbidden":
            text = _unknown(one["loc"], text)
        violations.append(Violation(path, text))
    return refusal(violations)


def _unknown(path: tuple[str | int, ...], text: str) -> str:
    """What to say of a field that is not there: what it is like, or whose it is."""
    name, part = str(path[-1]), _part(path[:-1])
    if part is None:
        return text
    near = difflib.get_close_matches(name, part.model_fields, n=1)
    owners = [a for a in ALGORITHMS if name in _ALGORITHMS[a].model_fields]
    if near:
        return f"there is no such field; did you mean {near[0]}?"
    if issubclass(part, Algorithm) and owners:
        return (
            f"there is no such field here; {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
        )
    if issubclass(part, Algorithm) and name in Training.model_fields:
        return "there is no such field here; training has it"
    return "there is no such field"


_ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": Grpo,
    "rloo": Rloo,
    "online_dpo": OnlineDpo,
    "nash_md": NashMd,
    "xpo": Xpo,
}


def _part(path: tuple[str | int, ...]) -> type[Part] | None:
    """The class of the message at a path of the spec."""
    part: type[Part] = JobSpec
    for step in path:
        if isinstance(step, int):
            continue
        field = part.model_fields.get(step)
        found = [] if field is None else _classes(field.annotation)
        if not found:
            return None
        part = found[0]
    return part


def _classes(annotation: Any) -> list[type[Part]]:
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _classes(argument)]
