"""An engine with torch.compile and CUDA graphs computes with what was written after their capture."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import RATE, assert_agrees, policy, step
from tests.services import Service, inference_service

__all__ = ["policy"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    engine = ENGINE | {
        "enforce_eager": "false",
        "compilation_config": '{"cudagraph_capture_sizes": [1, 2, 4]}',
    }
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(
            checkpoint, Path(folder), wait=False, environment={"TORCHDYNAMO_DISABLE": "0"}, **engine
        ) as service:
            service.wait_until("SERVING", 300)
            yield service


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["aliased", "written"])
def test_graphs_compute_with_what_was_written(service: Service, policy: Any, dtype: torch.dtype) -> None:
    model, weights = policy(dtype)
    weights.sync()
    assert weights.aliased == (dtype is torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(3):
        old = copy.deepcopy(model)
        step(model, optimizer)
        weights.sync()
        assert_agrees(service, model)
        with pytest.raises(AssertionError):
            assert_agrees(service, old)
