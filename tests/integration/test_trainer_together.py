"""A trainer of two ranks and an engine of two workers: each rank writes its own worker's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.weights.v1 import weights_pb2 as pb
from tests.ranks import ON_CPU, succeeded, two_ranks
from tests.services import Service, inference_service


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path]) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        engine = {
            "tensor_parallel_size": 2,
            "distributed_executor_backend": '"mp"',
            "dtype": "float32",
            "max_num_seqs": "16",
        }
        with inference_service(checkpoints["llama"], Path(folder), wait=False, **engine) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_grpo_trains_over_both(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, how: str
) -> None:
    """The assertions are in tests/together_run.py: bits, logprobs, who wrote what, and what was gathered."""
    service.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    command = ("-m", "tests.together_run", service.address, checkpoints["llama"], tmp_path, how)
    with two_ranks(*command, **ON_CPU) as ranks:
        for output in succeeded(ranks, 300):
            assert output.count("RAN") == 2
