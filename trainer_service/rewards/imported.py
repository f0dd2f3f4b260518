"""What a user's modules have, and what is made of it. Every failure names the field that asked."""

from __future__ import annotations

import ast
import difflib
import importlib
import operator
from collections.abc import Callable
from typing import Any

from tandem.errors import invalid


def attribute(module: str, name: str, field: str) -> Any:
    """Import `module` and take `name`, which may have dots, from it.

    Raises:
        InvalidArgument: the import fails, or the module has no such name.
    """
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of whatever the module runs
        raise invalid(field, f"cannot import {module}: {type(error).__name__}: {error}") from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(found), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise invalid(field, f"{module} has no {name}{hint}") from error


def made(factory: Callable[..., Any], arguments: dict[str, Any], name: str, field: str) -> Any:
    """Call `factory`, which the user knows as `name`.

    Raises:
        InvalidArgument: it does not take the arguments.
    """
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise invalid(field, f"{name}: {getattr(error, 'message', error)}") from error


def literals(text: str, name: str, field: str) -> dict[str, Any]:
    """Arguments as Python writes them, `(ngram_size=3)`: names with literals, of which nothing is run.

    Raises:
        InvalidArgument: they are not of that form.
    """
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only name=value is understood")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise invalid(field, f"cannot read the arguments of {name}: {error}") from error
