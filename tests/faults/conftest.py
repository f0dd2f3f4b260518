"""A service that faults are tried on, which they leave as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import raw
from tests.faults.plane import Plane
from tests.services import Service


@pytest.fixture(scope="module")
def made(llama: Service, checkpoints: dict[str, Path]) -> Plane:
    return Plane(llama, checkpoints["llama"])


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It is left with the checkpoint, committed, without a session."""
    made.start()
    yield made
    made.wait_until_alone()
    if raw.now(made.stub).weight_version != made.version or raw.state(made.stub) == "TORN":
        raw.restore(made.stub)
    made.start()
    made.assert_unchanged()
