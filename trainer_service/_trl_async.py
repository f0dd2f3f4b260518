"""TRL's asynchronous GRPO, imported without vLLM and without the notice of its experimental corner."""

from __future__ import annotations

import warnings

from trl.import_utils import TRLExperimentalWarning

from trainer_service._trl import without_vllm

with without_vllm(), warnings.catch_warnings():
    # That these may change in any release is told in docs/trainers.md; the tests hold them.
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.async_grpo import async_grpo_trainer as module
    from trl.experimental.async_grpo.async_grpo_config import AsyncGRPOConfig
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer as TrlAsyncGRPOTrainer
    from trl.experimental.async_grpo.async_grpo_trainer import (
        DataCollatorForRollout,
        FixedCountBatcher,
        TokenBudgetBatcher,
    )
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, RolloutSample
    from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop as AsyncRolloutLoop
    from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow

__all__ = [
    "TREE_ATTENTION",
    "AsyncGRPOConfig",
    "AsyncRolloutLoop",
    "AsyncRolloutWorker",
    "DataCollatorForRollout",
    "FixedCountBatcher",
    "RolloutSample",
    "TokenBudgetBatcher",
    "TreeRow",
    "TrlAsyncGRPOTrainer",
    "module",
]
