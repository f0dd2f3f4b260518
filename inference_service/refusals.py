"""What vLLM says against its input, made into Tandem's errors. 0.26 raises ValueErrors; 0.31 a tree of its own, wrapped
or not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

import pydantic

from tandem.errors import InvalidArgument, Reason, TandemError, Violation, invalid


def refusal(error: BaseException) -> str | None:
    """What vLLM says against its input, or None where the error is not the input's."""
    error = _cause(error)
    ours = any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__)
    if ours or isinstance(error, (ValueError, TypeError, OSError, AssertionError)):
        return one_line(error)
    return None


def named(
    error: BaseException, prefix: str, names: Collection[str], otherwise: str = ""
) -> InvalidArgument | None:
    """The refusal under the name of the parameter that it is about, or None where the error is not the input's.

    Args:
        error: what vLLM raised. One of Tandem's comes back as it is.
        prefix: of the field: `sampling`, `engine`.
        names: the parameters there are.
        otherwise: the name to use where vLLM names none; none names the whole.
    """
    if isinstance(error, TandemError):
        return error if isinstance(error, InvalidArgument) else None
    error = _cause(error)
    if isinstance(error, pydantic.ValidationError):
        return _validation(error, prefix, names, otherwise)
    if (said := refusal(error)) is None:
        return None
    told = getattr(error, "parameter", None)
    name = told if told in names else _first_name(said, names) or otherwise
    return invalid(f"{prefix}.{name}" if name else prefix, said)


def unknown(given: Iterable[str], names: Collection[str], prefix: str, what: str) -> InvalidArgument | None:
    """The error for names that there are not, or None where all are known."""
    violations = []
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            violations.append(Violation(f"{prefix}.{name}", f"there is no such {what}{hint}"))
    if not violations:
        return None
    first = violations[0]
    return InvalidArgument(Reason.FIELD_INVALID, f"{first.field}: {first.description}", violations=violations)


def one_line(error: BaseException) -> str:
    """An error's text in one line of bounded length."""
    return " ".join(str(error).split())[:2000]


def _cause(error: BaseException) -> BaseException:
    if type(error).__name__ == "EngineGenerateError" and error.__cause__:
        return error.__cause__
    return error


def _validation(
    error: pydantic.ValidationError, prefix: str, names: Collection[str], otherwise: str
) -> InvalidArgument:
    """Pydantic's errors by field, without its own trimmings."""
    found: dict[str, list[str]] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        text = " ".join(one["msg"].removeprefix("Value error, ").split())[:500]
        name = str(one["loc"][0]) if one["loc"] and str(one["loc"][0]) in names else ""
        name = name or _first_name(text, names) or otherwise
        found.setdefault(f"{prefix}.{name}" if name else prefix, []).append(text)
    violations = [Violation(field, ", or: ".join(texts)) for field, texts in found.items()]
    first = violations[0]
    return InvalidArgument(Reason.FIELD_INVALID, f"{first.field}: {first.description}", violations=violations)


def _first_name(text: str, names: Collection[str]) -> str:
    """The name that a sentence begins with, or the first in it that is no plain word, as `model` is."""
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text)
    return next((word for i, word in enumerate(words) if word in names and (i == 0 or "_" in word)), "")
