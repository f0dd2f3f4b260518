"""Each algorithm on one CUDA device with the engine, in each mode: what is sampled is of the policy, step by step."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.gpu.engines import ENGINE
from tests.runs import ALL, Run
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)"),
    pytest.mark.filterwarnings("ignore:You are using '.*', which is an experimental feature"),  # TRL's notice
]
#: vllm_mode, and sleep mode.
MODES = {"colocate": ("colocate", False), "sleep": ("colocate", True), "server": ("server", False)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Policy and reference."""
    return [
        models.make(tmp_path_factory.mktemp(f"llama{seed}"), seed=seed, hidden_size=256, head_dim=64)
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def service(paths: list[Path]) -> Iterator[Service]:
    engine = ENGINE | {"enable_sleep_mode": True}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        reference = f"--reference-model={paths[1]}"
        with inference_service(paths[0], Path(folder), reference, wait=False, **engine) as service:
            service.wait_until("SERVING", 300)
            yield service


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ALL)
def test_a_run(service: Service, paths: list[Path], tmp_path: Path, kind: str, mode: str) -> None:
    """With micro-batches, of which the second is sampled by an engine that slept in the same step."""
    service.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=60)
    vllm_mode, sleeps = MODES[mode]
    values: dict[str, Any] = {"steps_per_generation": 1} if kind in ("grpo", "rloo") else {}
    run = Run(
        kind,
        service,
        paths,
        tmp_path,
        dtype=torch.bfloat16,
        use_cpu=False,
        vllm_mode=vllm_mode,
        vllm_enable_sleep_mode=sleeps,
        gradient_accumulation_steps=2,
        max_steps=3,
        generation_kwargs={"logprobs": 0, "temperature": 1.0},
        **values,
    )
    apart: list[float] = []
    generation = run.trainer.vllm_generation
    watched = generation._generate

    def compared(batch: Any, sampling: Any) -> Any:
        rollouts = watched(batch, sampling)
        if not sampling.HasField("mixture_coef"):
            differences = [
                logprobs(run.trainer.model, list(group.token_ids), list(rollout.token_ids))
                - torch.tensor(list(rollout.logprobs))
                for group, of_group in zip(batch, rollouts, strict=True)
                for rollout in of_group
            ]
            apart.append(torch.cat(differences).abs().mean().item())
        return rollouts

    generation._generate = compared
    with run:
        assert run.trainer.state.global_step == len(logged(run.trainer, "loss")) == 3
        assert generation.calls >= 6
        assert run.trainer.policy_weights.aliased == (vllm_mode == "colocate")
        assert max(apart) < 0.1, "bfloat16 leaves 0.04 of logits around 8; after one step it is 0.17 to 0.4"
        generation.client.wake_up()
        generation.sync_weights()
        assert_same_bits(service, run.trainer.model)


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    values = model(torch.tensor([[*prompt, *completion]], device="cuda")).logits[0, len(prompt) - 1 : -1]
    return (
        values.float()
        .log_softmax(-1)
        .gather(-1, torch.tensor(completion, device="cuda")[:, None])[:, 0]
        .cpu()
    )
