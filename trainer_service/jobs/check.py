"""What is wrong with a job that only TRL, files and imports can tell: found before the job is taken.

TRL's configurations need torch, and rewards are the user's own code: neither belongs into the service. This module runs
as a process of its own, `python -m trainer_service.jobs.check`, which has TRL loaded and checks each job in a fork of
itself, so that a check takes a moment and an import of the user's is new each time. Requests and answers are lines of
JSON on standard input and output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import os
import signal
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic

from tandem.errors import InvalidArgument, Violation
from trainer_service.jobs.configure import OWN, arguments, given_options
from trainer_service.jobs.spec import PAIRWISE, Dataset, JobSpec

#: Seconds that a check may take by itself: more than the service waits for.
_LIMIT_S = 150
#: Of a configuration that is only tried, fields that would look for a GPU.
_DEVICE = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")


def check(spec: JobSpec) -> list[Violation]:
    """Everything that is wrong, with each field's path under `job`."""
    found = list(_options(spec))
    for part in (_model, _dataset, _rewards, _trackers, _hardware, _target):
        found += part(spec)
    return found


def _options(spec: JobSpec) -> Iterator[Violation]:
    from trainer_service.jobs.build import config_class

    config = config_class(spec.algorithm)
    hints = typing.get_type_hints(config)
    names = {field.name for field in dataclasses.fields(config) if field.init}
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(config)}
    wrong = False
    typed = {name for name, (path, _) in given_options(spec).items() if ".trl_options." not in path}
    for name in spec.settings.trl_options:
        path = f"job.{spec.algorithm}.trl_options.{name}"
        if name in OWN:
            yield Violation(path, "the service sets this itself")
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield Violation(path, f"{config.__name__} has no such field{hint}")
        elif name in typed or name in type(spec.settings).model_fields:
            yield Violation(path, f"there is a field for it: job.{spec.algorithm}.{name}")
        else:
            continue
        wrong = True
    for name, (path, value) in given_options(spec).items():
        if name not in names:
            if ".trl_options." not in path:
                wrong = True
                yield Violation(f"job.{path}", f"{config.__name__} has no such field")
        elif why := _type_error(hints.get(name, Any), value):
            wrong = True
            yield Violation(f"job.{path}", why)
        elif isinstance(value, str) and (known := choices[name]) and value not in known:
            wrong = True
            yield Violation(f"job.{path}", f"must be one of {', '.join(known)}, is {value!r}")
    if (
        not wrong and spec.hardware.processes == 1
    ):  # batches of several are counted by the job's own processes
        yield from _constructed(spec, config)


def _type_error(hint: Any, value: Any) -> str:
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(
            hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True)
        )
        adapter.validate_python(value)
    except pydantic.ValidationError as error:
        return "; or ".join(dict.fromkeys(one["msg"] for one in error.errors(include_url=False)))
    except Exception:  # noqa: BLE001  # a hint that pydantic does not know: the configuration tells by itself
        return ""
    return ""


def _constructed(spec: JobSpec, config: type[Any]) -> Iterator[Violation]:
    """What the configuration itself says against its values together."""
    values = arguments(spec, Path(tempfile.gettempdir()), cpu=True)
    values = {name: value for name, value in values.items() if name not in _DEVICE} | {"bf16": False}
    try:
        made = config(**values)
    except Exception as error:  # noqa: BLE001  # whatever TRL raises
        text = " ".join(str(error).split())[:1000]
        paths = {name: path for name, (path, _) in given_options(spec).items()}
        words = [word.strip("`'\"().,:;") for word in text.split()]
        # Enumerations' errors tell the value and no name.
        values_paths = {value: path for path, value in given_options(spec).values() if isinstance(value, str)}
        named = next(
            (found[word] for found in (paths, values_paths) for word in words if word in found),
            spec.algorithm,
        )
        yield Violation(f"job.{named}", text or type(error).__name__)
    else:
        if spec.algorithm not in PAIRWISE:
            yield from _enough(spec.dataset, made.generation_batch_size // made.num_generations)


def _enough(data: Dataset, needed: int) -> Iterator[Violation]:
    """Whether a dataset has the prompts of one generation. TRL leaves out what is less, and would train on nothing."""
    with contextlib.suppress(Exception):  # what is wrong with the dataset, `_dataset` tells
        if data.json_lines is not None:
            with Path(data.json_lines).open("rb") as file:
                rows = sum(1 for _ in itertools.islice((line for line in file if line.strip()), needed))
            field = "json_lines"
        elif data.parquet is not None:
            import pyarrow.parquet  # type: ignore[import-untyped]

            rows, field = pyarrow.parquet.read_metadata(data.parquet).num_rows, "parquet"
        elif data.reasoning_gym is not None:
            rows, field = data.reasoning_gym.size, "reasoning_gym.size"
        else:  # a hub's is known once it is loaded
            return
        if rows < needed:
            text = f"has {rows} prompts, and one generation takes {needed}"
            yield Violation(f"job.dataset.{field}", text)


def _model(spec: JobSpec) -> Iterator[Violation]:
    import torch
    from transformers import AutoConfig

    def load(path: str, revision: str | None = None) -> None:
        if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise ValueError(f"there is no folder {path}")
        AutoConfig.from_pretrained(path, revision=revision or "main")

    yield from _tried("job.model.path", lambda: load(spec.model.path, spec.model.revision))
    dtype = getattr(torch, spec.model.dtype, None)
    if spec.model.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        yield Violation("job.model.dtype", f"torch has no floating-point dtype {spec.model.dtype!r}")
    for i, reward in enumerate(spec.rewards):
        if (model := reward.model) is not None:
            yield from _tried(f"job.rewards[{i}].model", lambda model=model: load(model))  # type: ignore[misc]


def _dataset(spec: JobSpec) -> Iterator[Violation]:
    from trainer_service.jobs import build

    data = spec.dataset
    if data.hub is not None:
        yield from _tried("job.dataset.hub", lambda: _hub_row(spec), spec)
    elif data.json_lines is not None:
        yield from _tried("job.dataset.json_lines", lambda: _json_row(data.json_lines or ""), spec)
    elif data.parquet is not None:
        yield from _tried("job.dataset.parquet", lambda: _parquet_row(data.parquet or ""), spec)
    else:
        yield from _tried("job.dataset.reasoning_gym", lambda: build.tasks(data, 1)[0])


def _hub_row(spec: JobSpec) -> Any:
    """The columns, as `_columns` takes them: no row is read before the job is taken."""
    import datasets  # type: ignore[import-untyped]

    hub = spec.dataset.hub
    if hub is None:
        return None
    builder = datasets.load_dataset_builder(hub.path, hub.config, revision=hub.revision)
    return dict.fromkeys(builder.info.features) if builder.info.features else None


def _json_row(path: str) -> Any:
    with Path(path).open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    row = json.loads(first) if first else None
    if not isinstance(row, dict):
        raise ValueError("its first line is no JSON object")
    return row


def _parquet_row(path: str) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if not file.metadata.num_rows:
            raise ValueError("it has no rows")
        return next(file.iter_batches(batch_size=1)).to_pylist()[0]


def _rewards(spec: JobSpec) -> Iterator[Violation]:
    from trainer_service.jobs import build

    for i, reward in enumerate(spec.rewards):
        field = f"job.rewards[{i}]"
        if reward.judge is not None:
            yield from _tried(f"{field}.judge", lambda r=reward, f=field: build.judge(r, f))  # type: ignore[misc]
        else:
            yield from _tried(field, lambda r=reward, f=field: build.reward(r, spec.dataset, f))  # type: ignore[misc]


def _trackers(spec: JobSpec) -> Iterator[Violation]:
    from transformers.integrations import integration_utils

    names = spec.training.report_to
    if names in (["all"], ["none"]):
        return
    known = integration_utils.INTEGRATION_TO_CALLBACK
    # transformers does not look for the last two in all cases in which it can use them.
    here = {*integration_utils.get_available_reporting_integrations(), "azure_ml", "flyte"}  # type: ignore[no-untyped-call]
    for i, name in enumerate(names):
        if name not in known:
            yield Violation(
                f"job.training.report_to[{i}]", f"there is no tracker {name!r}: there are {', '.join(known)}"
            )
        elif name not in here:
            yield Violation(f"job.training.report_to[{i}]", f"{name} is not installed where the service runs")


def _hardware(spec: JobSpec) -> Iterator[Violation]:
    import yaml  # type: ignore[import-untyped]

    hardware = spec.hardware
    if hardware.accelerate_config is None:
        return
    path = "job.hardware.accelerate_config"
    try:
        given = yaml.safe_load(Path(hardware.accelerate_config).read_text())
        if not isinstance(given, dict):
            raise ValueError("it is no configuration of accelerate's")
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield Violation(path, _why(error))
        return
    count = given.get("num_processes")
    if count is not None and count != hardware.processes:
        yield Violation(
            "job.hardware.processes", f"is {hardware.processes}, and num_processes in {path} is {count}"
        )


def _target(spec: JobSpec) -> Iterator[Violation]:
    service = spec.inference.service
    if service is None:
        return
    for name, file in (("token_file", service.token_file), ("ca_file", service.ca_file)):
        if file is not None:
            yield from _tried(f"job.inference.service.{name}", Path(file).read_bytes)


def _tried(field: str, attempt: Callable[[], Any], spec: JobSpec | None = None) -> Iterator[Violation]:
    """What `attempt` raises, as a violation of the field. With `spec`, it returns the dataset's first row."""
    try:
        row = attempt()
    except InvalidArgument as error:
        yield from error.violations
    except Exception as error:  # noqa: BLE001  # of libraries, and of users' modules
        yield Violation(field, _why(error))
    else:
        if spec is not None and row is not None:
            yield from _columns(row, spec.dataset.columns, field)


def _columns(row: dict[str, Any], renamed: dict[str, str], field: str) -> Iterator[Violation]:
    """What is wrong with a dataset that has such rows. What is None in it is not known."""
    for name in renamed:
        if name not in row:
            yield Violation(f"job.dataset.columns.{name}", f"there is no such column: {', '.join(row)}")
    prompts = [name for name in row if renamed.get(name, name) == "prompt"]
    if not prompts:
        yield Violation("job.dataset.columns", f"no column is the prompt: there are {', '.join(row)}")
    elif (prompt := row[prompts[0]]) is not None and not _is_prompt(prompt):
        text = f"{prompts[0]} is neither text nor a list of messages in its first row: {prompt!r}"
        yield Violation(field, text[:1000])


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(message, dict) and "role" in message for message in value)
    return isinstance(value, str)


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # A ValueError is of a value, as all that is told here; another type says more.
    kind = "" if type(error) is ValueError and str(error) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:1000]


def _answer(line: str) -> list[dict[str, str]]:
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        violations = check(JobSpec.model_validate_json(line))
    return [dataclasses.asdict(violation) for violation in violations]


def main() -> None:
    """Answer each line of standard input with one."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for algorithm in ("grpo", "xpo"):  # TRL's two halves
        from trainer_service.jobs.build import config_class

        config_class(algorithm)
    import datasets  # noqa: F401

    from trainer_service import rewards  # noqa: F401

    for line in sys.stdin:
        process = os.fork()  # this process has no threads but this one
        if process == 0:
            signal.alarm(_LIMIT_S)  # ends it where the service was killed, and a user's module does not end
            try:
                text = json.dumps(_answer(line))
                os.write(answers, text.encode() + b"\n")
                os._exit(0)
            except BaseException as error:  # noqa: BLE001  # the service is told
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
        if os.waitpid(process, 0)[1] != 0:
            os.write(answers, b"null\n")


if __name__ == "__main__":
    main()
