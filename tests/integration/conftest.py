"""Fixtures of the inference service's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import raw
from tests.faults.plane import Plane
from tests.services import Service
from tests.shared import shared_service


@pytest.fixture(scope="session")
def exact(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """The tiny Llama in float32, where every number can be checked closely; with adapters, templates of callers and
    small messages.

    For tests that leave it without adapters.
    """
    with shared_service(
        checkpoints["llama"],
        "--max-message-bytes=65536",
        "--allow-chat-templates",
        dtype="float32",
        enable_lora="true",
        max_lora_rank="8",
        max_num_seqs="64",
        max_logprobs="259",
    ) as service:
        yield service


@pytest.fixture(scope="module")
def made(llama: Service, checkpoints: dict[str, Path]) -> Plane:
    """The tiny Llama's service, and a trainer of another policy."""
    return Plane(llama, checkpoints["llama"])


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It is left with the checkpoint, committed, without a session."""
    made.start()
    yield made
    if raw.now(made.stub).weight_version != made.version or raw.state(made.stub) == "TORN":
        raw.restore(made.stub)
    made.start()
    made.assert_unchanged()
