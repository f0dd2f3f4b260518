"""TRL's classes, imported without vLLM.

TRL imports vLLM wherever it finds it installed, also for users who never start an engine: seconds of time,
hundreds of megabytes, and a second set of threads. While TRL's modules load here, its own question whether
vLLM is there is answered with no. In this process TRL's own vLLM path then says that vLLM is not available.
Modules that the program imported from TRL before are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trl import import_utils


@contextmanager
def without_vllm() -> Iterator[None]:
    """Have TRL's modules that are imported in here find no vLLM."""
    really = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda min_version=None: False
    try:
        yield
    finally:
        import_utils.is_vllm_available = really


with without_vllm():
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as TrlGRPOTrainer
    from trl.trainer.rloo_config import RLOOConfig
    from trl.trainer.rloo_trainer import RLOOTrainer as TrlRLOOTrainer
    from trl.trainer.utils import get_config_model_id

__all__ = [
    "GRPOConfig",
    "RLOOConfig",
    "TrlGRPOTrainer",
    "TrlRLOOTrainer",
    "VLLMGeneration",
    "get_config_model_id",
    "without_vllm",
]
