"""The engine's load and counters, as vLLM's own logging hook reports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class EngineStats:
    """Counters since the service's process began, and the load as of the engine's last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    tokens_generated: int = 0
    rollouts_finished: int = 0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """A vLLM stat logger (a StatLoggerFactory makes one for each engine) that writes here."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    stats.num_running = scheduler_stats.num_running_reqs
                    stats.num_waiting = scheduler_stats.num_waiting_reqs
                    stats.kv_cache_usage = scheduler_stats.kv_cache_usage
                    stats.prefix_cache_queries += scheduler_stats.prefix_cache_stats.queries
                    stats.prefix_cache_hits += scheduler_stats.prefix_cache_stats.hits
                if iteration_stats is not None:
                    stats.tokens_generated += iteration_stats.num_generation_tokens

            def log_engine_initialized(self) -> None: ...

        return Logger(vllm_config, engine_index)
