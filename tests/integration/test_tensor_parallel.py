"""An engine of two ranks, each with an arena of its own: one policy, written whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tandem.weights.v1 import weights_pb2
from tests.integration.calls import ids, one
from tests.services import ENVIRONMENT, Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensor

PROMPT = [5, 80, 7, 200, 31]


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path]) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        engine = {
            "tensor_parallel_size": 2,
            "distributed_executor_backend": '"mp"',
            "enable_lora": "true",
            "max_lora_rank": "8",
        }
        with inference_service(checkpoints["qwen3"], Path(folder), wait=False, **engine) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_an_update_reaches_every_rank(service: Service, checkpoints: dict[str, Path], transport: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.bfloat16)
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport=transport)
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad(), weights.update():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            weights.sync()
            assert served_digest(service) == digest_of(model, service)
            assert_serves(service, model)
        weights.detach()


@pytest.mark.slow
def test_workers_digest_and_write_for_a_service_that_cannot(checkpoints: dict[str, Path]) -> None:
    """As on GPUs: what the workers add up of their parts is the whole's digest. Assertions are in split_engine.py."""
    command = [sys.executable, "-m", "tests.split_engine", str(checkpoints["qwen3"])]
    run = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "CHECKED" in run.stdout


@pytest.mark.slow
def test_an_adapter_reaches_every_rank(service: Service, checkpoints: dict[str, Path]) -> None:
    service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)
    base: Any = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, adapter="policy")
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(0, 0.1)
            weights.sync()
            assert_serves(service, model, lora="policy")
            with model.disable_adapter():
                assert_serves(service, model)
        weights.detach()


def assert_serves(service: Service, model: Any, lora: str = "") -> None:
    """The engine's rollouts are the model's."""
    sampling = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
    rollout = one(service, ids(PROMPT), sampling=sampling, lora=lora)
    tokens = torch.tensor([PROMPT + list(rollout.token_ids)])
    with torch.no_grad():
        logprobs = model(tokens).logits[0].float().log_softmax(-1)
    mine = [logprobs[i - 1, tokens[0, i]].item() for i in range(len(PROMPT), tokens.shape[1])]
    assert mine == pytest.approx(list(rollout.logprobs), abs=0.3)  # bf16, and sums in two halves


def served_digest(service: Service) -> int:
    request = weights_pb2.GetWeightVersionRequest(include_digest=True)
    return int(service.weights.GetWeightVersion(request, timeout=60).digest)


def digest_of(model: Any, service: Service) -> int:
    manifest = service.weights.GetManifest(weights_pb2.GetManifestRequest(), timeout=60).manifest
    held = dict(model.named_parameters(remove_duplicate=False))
    return combine([digest_tensor(held[tensor.name]) for tensor in manifest.tensors])
