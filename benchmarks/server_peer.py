"""TRL's client of `vllm serve`: how long its updates take. One line of JSON on standard output.

python -m benchmarks.server_peer PORT MODEL
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.colocate_peers import timed


def main(port: str, path: str) -> dict[str, Any]:
    """Measure its batched path, which is vLLM's packed NCCL, and the one for each parameter."""
    from trl.generation.vllm_client import VLLMClient

    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    policy.to("cuda")
    client: Any = VLLMClient(base_url=f"http://127.0.0.1:{port}", connection_timeout=120)
    client.init_communicator(device=0)

    def batched() -> None:
        client.update_model_params(policy)
        client.reset_prefix_cache()

    def one_by_one() -> None:
        with client.weight_update():
            for name, parameter in policy.named_parameters():
                client.update_named_param(name, parameter.data)
        client.reset_prefix_cache()

    return {"update_model_params": timed(batched), "per_parameter": timed(one_by_one, 3)}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(*sys.argv[1:])), file=answers, flush=True)
    os._exit(0)
