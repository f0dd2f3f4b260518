"""Ten steps of GRPO with the engine on another GPU, by NCCL: beside TRL's own server mode, in the same run.

    python -m benchmarks.server_steps --size 4B --out FILE

Needs two CUDA devices, vLLM and TRL: both engines are on the first, the trainers on the second, one after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.colocate import keep, make, shared_memory
from benchmarks.colocate_peers import SIZES, Peer
from benchmarks.measure import end_in_order, provenance
from benchmarks.server_mode import ENGINE, START_S, TRAINER_GPU, engine, vllm_serve
from tests.services import on_devices

#: For both engines: all rollouts of a step at once, and what `colocate_steps` asks for.
SETTINGS = ENGINE | {
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 8 << 30,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
    "cudagraph_capture_sizes": [1, 8, 64, 128],
}


def main() -> None:
    """Measure both, and write what was found beside what the file has already."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_steps")
    parser.add_argument("--size", choices=SIZES, default="4B")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server.json"))
    options = parser.parse_args()
    end_in_order()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {"provenance": provenance(), "gpus": [torch.cuda.get_device_name(i) for i in range(2)]}
    steps: dict[str, Any] = found.setdefault(options.size, {}).setdefault("grpo", {})
    there = on_devices(TRAINER_GPU)
    with tempfile.TemporaryDirectory(prefix="tdm", dir=shared_memory()) as temporary:
        folder = Path(temporary)
        model = make(options.size, folder / "model")
        with (
            engine(model, folder / "ours", options.eager, SETTINGS) as ours,
            vllm_serve(model, folder / "trl", SETTINGS) as trl,
        ):
            both = {
                "ours": Peer("grpo", model, ours.address, "server", environment=there),
                "trl_server": Peer(
                    "grpo", model, f"http://127.0.0.1:{trl.port}", "server", environment=there
                ),
            }
            ours.wait_until("SERVING", START_S)
            trl.wait()
            for name, peer in both.items():
                steps[name] = peer.found()
                keep(found, options.out)
                print(name, json.dumps(steps[name]), flush=True)
    times = [steps[name].get("step_s", {}).get("p50") for name in ("ours", "trl_server")]
    if all(times):
        steps["step, ours / TRL server"] = times[0] / times[1]
        keep(found, options.out)


if __name__ == "__main__":
    main()
