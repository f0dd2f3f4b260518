"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests import models
from tests.services import Service
from tests.shared import restore_all, shared_service


def pytest_collection_finish() -> None:
    """What was imported stays. Collections that looked through all of it would stop threads that must beat in time."""
    import hypothesis  # noqa: F401  # which looks for who refers to what, and would not find what is frozen

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each architecture."""
    return {name: models.make(tmp_path_factory.mktemp(name), name) for name in models.ARCHITECTURES}


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is logged: structlog's default renders tracebacks for seconds."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a path short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def as_they_began() -> None:
    """A file finds the checkpoints' weights in the services that it shares, whichever files ran before it."""
    restore_all()


@pytest.fixture(scope="session")
def llama(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """A service of the tiny Llama."""
    with shared_service(checkpoints["llama"]) as service:
        yield service


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint beside which `mixed` serves the tiny Llama: the same, with other weights."""
    return models.make(tmp_path_factory.mktemp("reference"), "llama", seed=1)


@pytest.fixture(scope="session")
def mixed(checkpoints: dict[str, Path], reference: Path) -> Iterator[Service]:
    """The tiny Llama in float32 with a reference model, and room for an adapter."""
    flag = f"--reference-model={reference}"
    with shared_service(checkpoints["llama"], flag, dtype="float32", enable_lora="true") as service:
        yield service
