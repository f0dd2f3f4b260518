"""Loads checkpoints as a vLLM worker does, without an engine around it, and writes down as JSON what came of each.

python -m tests.faults.loads FILE CHECKPOINT...
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import inference_service.worker  # noqa: F401  # registers the loader, as in a worker
from weight_transfer.digest import digest_tensor


def load(checkpoint: str, meeting: str) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    arguments = EngineArgs(
        model=checkpoint,
        load_format="tandem",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        model: Any = get_model_loader(config.load_config).load_model(config, config.model_config)
        parallel_state.destroy_model_parallel()
    held = model.tandem
    there = load_file(Path(checkpoint) / "model.safetensors")
    return {
        "reason": held.reason,
        "reloaded": held.reloaded,
        "arenas": [[arena.address, arena.size] for arena in held.arenas],
        "parameters": {n: [p.data_ptr(), list(p.shape)] for n, p in model.named_parameters()},
        "placements": {
            p.spec.name: {
                "dtype": p.spec.dtype,
                "shape": list(p.spec.shape),
                "alias": p.alias_reason(p.spec.dtype),
                "blocks": [[b.arena, b.arena_offset, list(b.shape), b.tensor_offset] for b in p.blocks],
                "whole": digest_tensor(p.gather(held.arenas))
                == digest_tensor(there[p.spec.name].to(getattr(torch, p.spec.dtype))),
            }
            for p in held.placements
        },
        "checkpoint": sorted(there),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {checkpoint: load(checkpoint, f"{folder}/meeting") for checkpoint in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps(found))
