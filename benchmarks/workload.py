"""The work that every contender does: the same prompts, the same numbers of tokens, the same sampling."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A batch: `n_prompts` prompts of `prompt_tokens` random tokens, `new_tokens` sampled for each."""

    n_prompts: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        return self.n_prompts * self.new_tokens

    def prompts(self, seed: int) -> list[list[int]]:
        """Prompts that no earlier seed has used: nothing is answered from a prefix cache."""
        draw = random.Random(f"{self}-{seed}")
        one = range(self.prompt_tokens)
        return [[draw.randrange(100, 40_000) for _ in one] for _ in range(self.n_prompts)]

    def check(self, tokens: int) -> None:
        """Raise where not every token was sampled: a contender that stopped early would seem fast."""
        if tokens != self.tokens:
            raise RuntimeError(f"{tokens} tokens, not {self.tokens}")


THROUGHPUT = Workload(n_prompts=64, prompt_tokens=32, new_tokens=32)
LATENCY = Workload(n_prompts=1, prompt_tokens=32, new_tokens=1)

#: For all contenders alike.
ENGINE = {
    "max_model_len": 256,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 512 << 20,
    "enforce_eager": True,
    "seed": 0,
    "dtype": "bfloat16",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
