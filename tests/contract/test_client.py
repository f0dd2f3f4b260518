"""The client for threads is made from the one for asyncio, and both have the same verbs."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import unasync

from tandem import client


def test_the_client_for_threads_is_what_it_would_be_made() -> None:
    assert unasync.stale() == [], "python -m tests.contract.unasync --write"


def test_nothing_of_asyncio_is_left_in_it() -> None:
    for path, text in unasync.made().items():
        code = text.partition('"""\n')[2]
        assert "async" not in code.lower(), path
        assert "await" not in code, path


@pytest.mark.parametrize(
    ("threads", "aio"), [(client.TandemClient, client.AsyncTandemClient), (client.Job, client.AsyncJob)]
)
def test_both_have_the_same_verbs_and_documentation(threads: type, aio: type) -> None:
    names = {name for name in vars(aio) if not name.startswith("_")}
    assert {name for name in vars(threads) if not name.startswith("_")} == names
    for name in names:
        one, other = getattr(threads, name), getattr(aio, name)
        assert list(inspect.signature(one).parameters) == list(inspect.signature(other).parameters)
        assert one.__doc__


def test_public_names_are_documented() -> None:
    for name in client.__all__:
        value = getattr(client, name)
        assert not inspect.isclass(value) or value.__doc__, name


@pytest.mark.parametrize(
    "module", sorted(path.stem for path in Path(client.__path__[0]).glob("*.py") if path.stem != "__init__")
)
def test_examples_in_docstrings_are_true(module: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"tandem.client.{module}"))
    assert failed == 0
