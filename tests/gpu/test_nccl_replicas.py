"""Two engines take the weights of a trainer on another GPU at the same time, and one of them dies while they do."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import digest, digest_of
from tests.services import Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.replicated import ReplicatedWeights
from weight_transfer.cuda import several

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture
def services(checkpoint: Path) -> Iterator[list[Service]]:
    """Both on the first GPU, or on two where there are three."""
    gpus = [0, 2 if torch.cuda.device_count() > 2 else 0]
    with tempfile.TemporaryDirectory(prefix="tdm") as folder, ExitStack() as stack:
        started = []
        for n, gpu in enumerate(gpus):
            (place := Path(folder, str(n))).mkdir()
            service = inference_service(checkpoint, place, wait=False, environment=on_devices(gpu), **ENGINE)
            started.append(stack.enter_context(service))
            started[-1].wait_until("SERVING", 240)  # one after the other: each looks at what memory is free
        yield started


@pytest.fixture
def replicated(services: list[Service], checkpoint: Path) -> Iterator[Any]:
    made: list[ReplicatedWeights] = []
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(InferenceClient(service.address))) for service in services]

        def make(dtype: torch.dtype) -> tuple[Any, ReplicatedWeights]:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to("cuda:1")
            made.append(ReplicatedWeights(clients, lambda: model, timeout_s=60))
            return model, made[-1]

        yield make
        for weights in made:
            weights.detach()


def change(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def test_every_replica_holds_the_same_bits_until_one_dies(services: list[Service], replicated: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, weights = replicated(dtype)
        for _ in range(3):
            change(model)
            weights.sync()
            assert weights.transport == "nccl"
            wanted = (weights.weight_version, digest_of(model, services[0]))
            assert [digest(service) for service in services] == [wanted] * 2
        if dtype == torch.float32:
            weights.detach()

    wait, died = several.Several.wait, []

    def kills(self: Any, *args: Any) -> None:
        if not died:
            for process in (services[1].process.pid, *services[1].children()):
                os.kill(process, signal.SIGKILL)
            died.append(time.monotonic())
        wait(self, *args)

    change(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several.Several, "wait", kills)
        weights.sync()
    assert time.monotonic() - died[0] < 3
    assert weights.holding() == {services[0].address}
    assert digest(services[0]) == (weights.weight_version, digest_of(model, services[0]))
