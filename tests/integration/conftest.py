"""Fixtures of the inference service's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import Service, inference_service


@pytest.fixture(scope="session")
def exact(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """The tiny Llama in float32, where every number can be checked closely; with adapters, templates of callers and
    small messages.

    For tests that leave it as it was, but for its version: committed, serving, without adapters.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(
            checkpoints["llama"],
            Path(folder),
            "--max-message-bytes=65536",
            "--allow-chat-templates",
            dtype="float32",
            enable_lora="true",
            max_lora_rank="8",
            max_num_seqs="64",
            max_logprobs="259",
        ) as service,
    ):
        yield service
