"""Each algorithm trains a LoRA adapter, which reaches the engine merged into its weights, or alone beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tandem.weights.v1 import weights_pb2 as pb
from tests.integration.calls import stats
from tests.integration.test_adapters import unload
from tests.runs import ALL, Run
from tests.services import Service
from tests.trainers import assert_same_bits, logged, model_of
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensors

pytestmark = [
    pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)"),
    pytest.mark.filterwarnings("ignore:You are using '.*', which is an experimental feature"),  # TRL's notice
]


@pytest.fixture
def engine(mixed: Service, reference: Path) -> Iterator[Service]:
    """The service with the weights of its reference: the base of an adapter is the reference of its algorithm."""
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    base = model_of(reference, torch.float32)
    with closing(InferenceClient(mixed.address)) as client:
        weights = PolicyWeights(client, lambda: base, transport="stream", timeout_s=30)
        weights.sync()
        weights.detach()
    yield mixed
    for name in stats(mixed).loras:
        unload(mixed, name)


def digest(service: Service, adapter: str = "") -> int:
    asked = pb.GetWeightVersionRequest(include_digest=True, adapter=adapter)
    return service.weights.GetWeightVersion(asked, timeout=30).digest


@torch.no_grad()
def logprobs(model: Any, sequence: list[int]) -> torch.Tensor:
    values = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
    return values.gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0]


@pytest.mark.parametrize(("lora_mode", "mode"), [("merged", "colocate"), ("adapter", "server")])
@pytest.mark.parametrize("kind", ALL)
def test_lora(engine: Service, reference: Path, tmp_path: Path, kind: str, lora_mode: str, mode: str) -> None:
    base, sequence = digest(engine), list(range(20, 60))
    with Run(
        kind,
        engine,
        [reference, reference],
        tmp_path,
        ref_model=None,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        lora_mode=lora_mode,
        vllm_mode=mode,
        max_steps=2,
        learning_rate=0.05,
    ) as made:
        trainer = made.trainer
        assert trainer.ref_model is None, "with the adapter off, the model is the reference"
        assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
        trainer.vllm_generation.sync_weights()
        if lora_mode == "merged":
            assert_same_bits(engine, trainer.model)
        else:
            own = sorted(adapter_tensors(trainer.model), key=lambda source: source.name)
            assert digest(engine, "policy") == combine(digest_tensors([source.read() for source in own]))
            assert digest(engine) == base, "the engine's weights were written"
        (found,) = trainer.vllm_generation.client.score([sequence], lora=trainer.vllm_generation.lora)
        model = trainer.model.eval()
        wanted = logprobs(model, sequence)
        torch.testing.assert_close(torch.tensor(list(found.logprobs)), wanted, atol=1e-3, rtol=0)
        with model.disable_adapter():
            assert (wanted - logprobs(model, sequence)).abs().max() > 0.02, (
                "training changed nothing: no test"
            )
