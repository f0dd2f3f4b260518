"""How long new weights take from the trainer to the engine, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.contenders import Tandem
from benchmarks.measure import percentiles
from trainer_service.weights import PolicyWeights


def measure(contender: Tandem, model: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds and bytes of `rounds` updates by each transport, after one that does not count."""
    return {
        "aliased (bf16, shared memory)": _rounds(contender, model, torch.bfloat16, "shared", rounds),
        "written (fp32 cast into shared memory)": _rounds(contender, model, torch.float32, "shared", rounds),
        "stream (bf16 over gRPC)": _rounds(contender, model, torch.bfloat16, "stream", rounds),
    }


def _rounds(contender: Tandem, path: Path, dtype: torch.dtype, transport: str, rounds: int) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with _weights(contender, model, transport) as weights:
        weights.sync()
        for _ in range(rounds):
            if weights.aliased and dtype == torch.bfloat16:
                with weights.update():  # what an optimizer's step does: the lease, its writes, the commit
                    pass
            else:
                weights._dirty = True  # as a step leaves it
                weights.sync()
        history = list(weights.history)[-rounds:]
    return {
        "ms": percentiles([stats.seconds * 1e3 for stats in history]),
        "stopped_ms": percentiles([stats.stopped * 1e3 for stats in history]),
        "bytes": history[-1].nbytes,
    }


@contextmanager
def _weights(contender: Tandem, model: torch.nn.Module, transport: str) -> Iterator[PolicyWeights]:
    weights = PolicyWeights(contender.client, lambda: model, transport=transport)
    try:
        yield weights
    finally:
        weights.detach()
