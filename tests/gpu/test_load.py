"""While an engine loads, its device never holds its weights twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.colocate import peak
from benchmarks.colocate_peers import used
from tests import models
from tests.gpu.engines import ENGINE
from tests.services import inference_service

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: So large that all else that an engine has comes and goes beside them.
SHAPE = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=12, head_dim=64)


def test_there_is_one_copy_of_the_weights_at_any_moment(tmp_path: Path) -> None:
    checkpoint = models.make(tmp_path, "qwen3", **SHAPE)
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    before = used()
    engine = ENGINE | {"kv_cache_memory_bytes": 64 << 20}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(checkpoint, Path(folder), wait=False, **engine) as service:
            with peak() as seen:
                service.wait_until("SERVING", 240)
            after = used()
    assert after - before > weights > 1 << 30
    assert seen[0] - after < weights // 4
