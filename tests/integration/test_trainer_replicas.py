"""Trainers over several real services, of which one dies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tandem.errors import InvalidArgument
from tests.asynchronous import arguments, prompts, tokenizer
from tests.integration.calls import stats
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, make, model_of, reward
from trainer_service.trainers import AsyncGRPOTrainer

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture
def pair(checkpoints: dict[str, Path]) -> Iterator[list[Service]]:
    """Two services of the tiny Llama, which nobody else uses."""
    with ExitStack() as lives:
        folders = [Path(lives.enter_context(tempfile.TemporaryDirectory(prefix="tdm"))) for _ in range(2)]
        services = [
            lives.enter_context(inference_service(checkpoints["llama"], folder, wait=False, dtype="float32"))
            for folder in folders
        ]
        for service in services:
            service.wait_until("SERVING")
        yield services


class Kill(TrainerCallback):
    """Kills a service after the second step."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.service.process.kill()
            self.service.process.wait()


@pytest.mark.slow
def test_trainers_take_several_addresses_and_outlive_one_of_them(
    pair: list[Service], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """First a trainer over both; then an asynchronous one, which loses one of them."""
    addresses = [service.address for service in pair]
    both = SimpleNamespace(address=addresses)
    model = model_of(checkpoints["llama"], torch.float32)
    trainer = make("grpo", both, model, tmp_path / "a", vllm_mode="server", max_steps=2)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.policy_weights.holding() == set(addresses)
    trainer.vllm_generation.sync_weights()
    for service in pair:
        assert_same_bits(service, model)
        assert stats(service).rollouts_finished > 0
    trainer.close()
    before = [stats(service).rollouts_finished for service in pair]
    lasting = AsyncGRPOTrainer(
        str(checkpoints["llama"]),
        reward,
        arguments(tmp_path / "b", max_inflight_tasks=32),
        prompts(),
        processing_class=tokenizer(),
        callbacks=[Kill(pair[1])],
        inference_address=addresses,
    )
    lasting.train()
    assert lasting.state.global_step == 4
    assert lasting.policy_weights.holding() == {addresses[0]}
    assert_same_bits(pair[0], lasting.model)
    assert stats(pair[0]).rollouts_finished > before[0]
    assert max(logged(lasting, "sample/staleness_max")) <= 1
    lasting.close()


def test_several_services_share_no_memory(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    both = SimpleNamespace(address=["unix:///tmp/a", "unix:///tmp/b"])
    with pytest.raises(InvalidArgument, match="vllm_mode"):
        make("grpo", both, model_of(checkpoints["llama"], torch.float32), tmp_path)  # type: ignore[arg-type]
    both.address = ["unix:///tmp/a", "nowhere"]
    with pytest.raises(InvalidArgument, match="inference_address"):
        make("grpo", both, model_of(checkpoints["llama"], torch.float32), tmp_path, vllm_mode="server")  # type: ignore[arg-type]
