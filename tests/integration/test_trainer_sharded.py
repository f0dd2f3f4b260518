"""Policies on two ranks, whole on each or spread over both, by FSDP2 and by ZeRO-3: the engine holds the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.weights.v1 import weights_pb2 as pb
from tests.ranks import ON_CPU, ROOT, succeeded, two_ranks
from tests.services import Service

RUNS = {
    "rloo server peft_config lora_mode learning_rate",
    "grpo colocate",
    "rloo server",
    "online_dpo server",
    "nash_md colocate",
    "xpo server",
    "grpo server peft_config",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2", "zero3"])
def test_every_algorithm_trains_over_two_ranks(
    mixed: Service, checkpoints: dict[str, Path], reference: Path, tmp_path: Path, how: str
) -> None:
    """The assertions are in tests/sharded_run.py: the engine's bits, and its logprobs against the policy's."""
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    command = ("-m", "tests.sharded_run", mixed.address, checkpoints["llama"], reference, tmp_path, how)
    deepspeed = {"PYTHONPATH": f"{ROOT}:{ROOT}/.venv/deepspeed"}
    with two_ranks(*command, **(ON_CPU if how != "zero3" else deepspeed)) as ranks:
        for output in succeeded(ranks, 400):
            assert {
                line.removeprefix("RAN ") for line in output.splitlines() if line.startswith("RAN ")
            } == RUNS
