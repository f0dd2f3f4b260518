"""Small engines on a device, of which several fit at once."""

from __future__ import annotations

from typing import Any

ENGINE: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.1,  # what vLLM wants free: others may have the rest
    "enforce_eager": "true",
}
#: With CUDA graphs of decoding, and nothing compiled, which takes a minute.
GRAPHS = ENGINE | {
    "enforce_eager": "false",
    "compilation_config": '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}',
}
