"""TRL's client of `vllm serve`: how long its updates take. One line of JSON on standard output.

python -m benchmarks.server_peer PORT MODEL [dense | sparse]

With `sparse`, the server has vLLM's sparse_nccl backend (0.26's: one GPU, patches of the parameters as the engine has
them), which TRL does not use; TRL's client brings up the communicator and calls the routes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.colocate_peers import timed
from benchmarks.measure import ROUNDS, WARM_UPS, free_port, percentiles
from benchmarks.server_sparse import change
from weight_transfer.sparse import bits


def main(port: str, path: str, way: str = "dense") -> dict[str, Any]:
    """Measure its batched path, which is vLLM's packed NCCL, and the one for each parameter; or patches."""
    from trl.generation.vllm_client import VLLMClient

    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    policy.to("cuda")
    # Not the port that it has by itself: another run on this host may have that.
    client: Any = VLLMClient(
        base_url=f"http://127.0.0.1:{port}", group_port=free_port(), connection_timeout=120
    )
    client.init_communicator(device=0)

    if way == "sparse":
        return patches(client, policy)

    def batched() -> None:
        client.update_model_params(policy)
        client.reset_prefix_cache()

    def one_by_one() -> None:
        with client.weight_update():
            for name, parameter in policy.named_parameters():
                client.update_named_param(name, parameter.data)
        client.reset_prefix_cache()

    return {"update_model_params": timed(batched), "per_parameter": timed(one_by_one, 3)}


def patches(client: Any, policy: Any) -> dict[str, Any]:
    """Updates after which 1 % of the elements have other bits: with looking for them, as ours does, and without."""
    now = fused(policy)
    base = {name: value.clone() for name, value in now.items()}
    changed: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def look() -> None:
        changed.clear()
        for name, value in now.items():
            is_now, was = bits(value), bits(base[name])
            where = torch.ne(is_now, was).nonzero().view(-1)
            if len(where):
                changed.append((name, where.to(torch.int32), value.view(-1)[where]))
                was[where] = is_now[where]

    def send() -> None:
        told = {
            "names": [name for name, _, _ in changed],
            "dtype_names": [str(values.dtype).removeprefix("torch.") for _, _, values in changed],
            "shapes": [list(now[name].shape) for name, _, _ in changed],
            "num_updates_list": [len(where) for _, where, _ in changed],
        }
        client._post(f"{client.base_url}/start_weight_update", json={})
        with ThreadPoolExecutor(max_workers=1) as executor:
            url = f"{client.base_url}/update_weights"
            answer = executor.submit(client._post, url, json={"update_info": told})
            for _, where, values in changed:
                for tensor in (where, values):
                    client.communicator.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            answer.result()
        client._post(f"{client.base_url}/finish_weight_update", json={})
        client.reset_prefix_cache()

    whole, sent = [], []
    for _ in range(WARM_UPS + ROUNDS):
        change(now.values(), 0.01)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        look()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        send()
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - begin) * 1e3)
        sent.append((time.perf_counter() - middle) * 1e3)
    nbytes = sum(where.nbytes + values.nbytes for _, where, values in changed)
    return {
        "update": percentiles(whole[WARM_UPS:]),
        "sending": percentiles(sent[WARM_UPS:]),
        "nbytes": nbytes,
    }


def fused(policy: Any) -> dict[str, torch.Tensor]:
    """The parameters of a Qwen3 as vLLM has them: q, k and v are one, and gate and up."""
    parts = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    parts |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in policy.named_parameters():  # in the order in which they are fused
        for part, together in parts.items():
            name = name.replace(f".{part}.", f".{together}.")
        found.setdefault(name, []).append(parameter.detach())
    return {
        name: torch.cat(values) if len(values) > 1 else values[0].clone() for name, values in found.items()
    }


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(*sys.argv[1:])), file=answers, flush=True)
    os._exit(0)
