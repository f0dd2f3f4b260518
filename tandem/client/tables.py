"""Tables, such as a file's of TOML, made messages of the contract: each name is a field's, snake_case or as in JSON.

What is wrong is told by its path, all of it at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from tandem.errors import InvalidArgument, Reason, Violation, invalid

_M = TypeVar("_M", bound=Message)

_EXACT = 2**53  # a Struct's numbers are doubles
_WORDS: dict[int, tuple[Any, str]] = {
    FieldDescriptor.CPPTYPE_STRING: (str, "text"),
    FieldDescriptor.CPPTYPE_BOOL: (bool, "true or false"),
    FieldDescriptor.CPPTYPE_INT32: (int, "a whole number"),
    FieldDescriptor.CPPTYPE_INT64: (int, "a whole number"),
    FieldDescriptor.CPPTYPE_UINT32: (int, "a whole number"),
    FieldDescriptor.CPPTYPE_UINT64: (int, "a whole number"),
    FieldDescriptor.CPPTYPE_DOUBLE: ((int, float), "a number"),
    FieldDescriptor.CPPTYPE_FLOAT: ((int, float), "a number"),
}


def message(kind: type[_M], table: Mapping[str, Any], path: str) -> _M:
    """The message of a table. A value of None is the same as none.

    Args:
        kind: the message's class.
        table: by the names of its fields.
        path: what to call the message in errors.

    Raises:
        InvalidArgument: names every field that does not exist, or has a value of the wrong type or range.
    """
    made, wrong = kind(), list[Violation]()
    _fill(made, table, path, wrong)
    if len(wrong) == 1:
        raise invalid(wrong[0].field, wrong[0].description)
    if wrong:
        text = f"{wrong[0].field}: {wrong[0].description}, and {len(wrong) - 1} more"
        raise InvalidArgument(Reason.FIELD_INVALID, text, violations=wrong)
    return made


def merge(old: Message, new: Message) -> None:
    """Put what `new` has into `old`: tables at any depth add to those that are there, lists replace them."""
    if isinstance(old, Struct) and isinstance(new, Struct):
        for name, value in new.fields.items():
            if (
                value.HasField("struct_value")
                and name in old.fields
                and old.fields[name].HasField("struct_value")
            ):
                merge(old.fields[name].struct_value, value.struct_value)
            else:
                old.fields[name].CopyFrom(value)
        return
    for field, value in new.ListFields():
        if field.is_repeated and field.message_type and field.message_type.GetOptions().map_entry:
            getattr(old, field.name).MergeFrom(value)
        elif field.is_repeated:
            old.ClearField(field.name)
            getattr(old, field.name).MergeFrom(value)
        elif field.message_type:
            part = getattr(old, field.name)
            part.SetInParent()  # also where it is empty, which takes another choice's place
            merge(part, value)
        else:
            setattr(old, field.name, value)


def clear(old: Message, table: Mapping[str, Any]) -> None:
    """Take from `old` what a table, of which `message` made one, has as None or as an empty list."""
    fields = _fields(cast(Descriptor, old.DESCRIPTOR))
    for name, value in table.items():
        field = fields[name]
        if value is None or (field.is_repeated and not value and not isinstance(value, Mapping)):
            old.ClearField(field.name)
        elif isinstance(value, Mapping) and not field.is_repeated and old.HasField(field.name):
            part = getattr(old, field.name)
            if not isinstance(part, Struct):  # of which None is a value
                clear(part, value)


def _fill(made: Any, table: Mapping[str, Any], path: str, wrong: list[Violation]) -> None:
    if isinstance(made, Struct):
        problems = list(_unfit(table, path))
        wrong += problems
        if not problems:
            _try(lambda: made.update(table), path, table, wrong)
        return
    fields = _fields(made.DESCRIPTOR)
    given: dict[str, str] = {}
    for name, value in table.items():
        if (field := fields.get(name)) is None:
            near = difflib.get_close_matches(str(name), [f.name for f in made.DESCRIPTOR.fields], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            wrong.append(Violation(f"{path}.{name}", f"there is no such field{hint}"))
            continue
        if value is None:
            continue
        one_of = field.containing_oneof.name if field.containing_oneof else field.name
        if one_of in given:
            wrong.append(Violation(f"{path}.{name}", f"is given beside {given[one_of]}: one of them goes"))
            continue
        given[one_of] = name
        _set(made, field, value, f"{path}.{name}", wrong)


def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """By both names that a field has."""
    return {name: field for field in descriptor.fields for name in (field.json_name, field.name)}


def _set(made: Any, field: FieldDescriptor, value: Any, path: str, wrong: list[Violation]) -> None:
    if field.is_repeated and field.message_type and field.message_type.GetOptions().map_entry:
        _set_map(getattr(made, field.name), field, value, path, wrong)
    elif field.is_repeated:
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
            wrong.append(Violation(path, f"must be a list, is {_shown(value)}"))
            return
        items = getattr(made, field.name)
        for index, item in enumerate(value):
            if field.message_type:
                _message(items.add(), item, f"{path}[{index}]", wrong)
            elif _fits(field, item, f"{path}[{index}]", wrong):
                _try(lambda item=item: items.append(item), f"{path}[{index}]", item, wrong)
    elif field.message_type:
        part = getattr(made, field.name)
        part.SetInParent()  # an empty table is a choice too: managed = {}
        _message(part, value, path, wrong)
    elif _fits(field, value, path, wrong):
        _try(lambda: setattr(made, field.name, value), path, value, wrong)


def _message(part: Any, value: Any, path: str, wrong: list[Violation]) -> None:
    if isinstance(value, Mapping):
        _fill(part, value, path, wrong)
    else:
        wrong.append(Violation(path, f"must be a table, is {_shown(value)}"))


def _set_map(entries: Any, field: FieldDescriptor, value: Any, path: str, wrong: list[Violation]) -> None:
    if not isinstance(value, Mapping):
        wrong.append(Violation(path, f"must be a table, is {_shown(value)}"))
        return
    entry = field.message_type.fields_by_name  # type: ignore[union-attr]
    keys, values = entry["key"], entry["value"]
    for key, item in value.items():
        if keys.cpp_type != FieldDescriptor.CPPTYPE_STRING and isinstance(key, str) and key.isdecimal():
            key = int(key)  # a file's keys are text
        at = f"{path}.{key}"
        if _fits(keys, key, at, wrong) and _fits(values, item, at, wrong):
            _try(lambda key=key, item=item: entries.__setitem__(key, item), at, item, wrong)


def _fits(field: FieldDescriptor, value: Any, path: str, wrong: list[Violation]) -> bool:
    """Whether the value's type is the field's. protobuf itself would take True for 1.0, and 1 for true."""
    types, words = _WORDS[field.cpp_type]
    if isinstance(value, types) and isinstance(value, bool) == (types is bool):
        return True
    wrong.append(Violation(path, f"must be {words}, is {_shown(value)}"))
    return False


def _try(put: Any, path: str, value: Any, wrong: list[Violation]) -> None:
    try:
        put()
    except (TypeError, ValueError):  # of the right type, so it is the range
        wrong.append(Violation(path, f"is out of range: {_shown(value)}"))


def _unfit(value: Any, path: str) -> Iterator[Violation]:
    """What of a value JSON does not have."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _unfit(item, f"{path}.{key}")
            else:
                yield Violation(path, f"has a name that is no text: {_shown(key)}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unfit(item, f"{path}[{index}]")
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        yield Violation(path, f"is too large to be sent exactly: {value}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield Violation(path, f"must be a finite number, is {value}")
    elif not isinstance(value, str | int | float | None):
        yield Violation(path, f"must be text, a number, true or false, a list or a table, is {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
