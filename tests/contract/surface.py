"""The public surface of Tandem's modules as text, so that a change of it shows in the diff of a golden file.

`python -m tests.contract.surface --write` rewrites the files; review what changed.

A module's public names are those of its `__all__`, else those that it defines and that do not begin with an
underscore. To freeze another module, add it to MODULES.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

MODULES = {
    "tandem": [
        "tandem.errors",
        "tandem.rpc",
        "tandem.rpc.listen",
        "tandem.rpc.options",
        "tandem.rpc.address",
        "tandem.client",
        "tandem.client.view",
    ],
    "weight_transfer": [
        "weight_transfer.arena",
        "weight_transfer.digest",
        "weight_transfer.manifest",
        "weight_transfer.placement",
        "weight_transfer.scatter",
        "weight_transfer.transports.base",
    ],
    "inference_service": ["inference_service.config"],
    "trainer_service": ["trainer_service.config", "trainer_service.trainers"],
    "trainer_service_rewards": ["trainer_service.rewards"],
}
"""Modules by the name of the golden file that holds them."""

GOLDEN = Path(__file__).parent / "surface"


def describe(modules: list[str]) -> str:
    """Return the public names of modules with their signatures, one to a line."""
    return "\n".join(line for name in modules for line in _module(name)) + "\n"


def difference(name: str) -> str:
    """Return how a golden file differs from what is there; nothing if it does not."""
    path = GOLDEN / f"{name}.txt"
    old = path.read_text().splitlines() if path.exists() else []
    new = describe(MODULES[name]).splitlines()
    return "\n".join(difflib.unified_diff(old, new, "frozen", "now", lineterm="", n=1))


def _module(module_name: str) -> Iterator[str]:
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is None:
        own = vars(module).items()
        names = [name for name, value in own if not name.startswith("_") and _is_own(value, module_name)]
    for name in sorted(names):
        yield from _object(f"{module_name}.{name}", getattr(module, name))


def _is_own(value: Any, module_name: str) -> bool:
    if inspect.ismodule(value):
        return False
    home = getattr(value, "__module__", None)
    if home is None:  # a constant
        constant = isinstance(value, (str, int, float, bytes, tuple, frozenset))
        return constant and value is not TYPE_CHECKING
    return bool(home == module_name)


def _object(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        yield from _class(name, value)
    elif callable(value):
        yield f"{name}{_signature(value)}"
    elif isinstance(value, frozenset):  # in an order that stays
        yield f"{name} = {sorted(value)!r}"
    else:
        yield f"{name} = {value!r}"


def _class(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__qualname__ for base in cls.__bases__ if base is not object)
    if issubclass(cls, enum.Enum):
        yield f"{name}({bases}): {', '.join(member.name for member in cls)}"
        return
    fields = getattr(cls, "model_fields", {})
    if fields:  # settings: what a user can set, not how pydantic keeps it
        yield f"{name}({bases})"
        for field, info in sorted(fields.items()):
            default = "required" if info.is_required() else f"= {info.default!r}"
            if info.default_factory is not None:
                default = f"= {info.default_factory.__name__}()"
            yield f"{name}.{field}: {inspect.formatannotation(info.annotation)} {default}"
        return
    own_init = "__init__" in vars(cls) or dataclasses.is_dataclass(cls)
    yield f"{name}({bases}){' ' + _signature(cls) if own_init else ''}"
    for attribute, value in sorted(vars(cls).items()):
        if attribute.startswith("_") or attribute in getattr(cls, "__dataclass_fields__", {}):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            yield f"{name}.{attribute}{_signature(value.__func__)} [{type(value).__name__}]"
        elif isinstance(value, functools.cached_property):
            yield f"{name}.{attribute}: {_result(value.func)}"
        elif isinstance(value, property):
            yield f"{name}.{attribute}: {_result(value.fget)}"
        elif inspect.isfunction(value):
            kind = "async " if inspect.iscoroutinefunction(value) else ""
            yield f"{name}.{attribute}{_signature(value)}{' [async]' if kind else ''}"
        elif not inspect.isdatadescriptor(value):
            yield f"{name}.{attribute} = {value!r}"


def _result(function: Any) -> str:
    return str(inspect.signature(function).return_annotation)


def _signature(value: Any) -> str:
    return str(inspect.signature(value)).replace("'", "")


def main(arguments: list[str]) -> int:
    """Write the golden files with `--write`; else say what differs. Returns 1 if something does."""
    changed = False
    for name in MODULES:
        if text := difference(name):
            changed = True
            sys.stdout.write(f"{text}\n")
        if arguments == ["--write"]:
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / f"{name}.txt").write_text(describe(MODULES[name]))
    return 1 if changed and arguments != ["--write"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
