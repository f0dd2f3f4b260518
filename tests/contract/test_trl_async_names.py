"""Every name of TRL's asynchronous GRPO that trainer_service relies on: renamed ones fail here."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from trainer_service import _trl_async
from trainer_service._trl_async import (
    AsyncGRPOConfig,
    AsyncRolloutLoop,
    AsyncRolloutWorker,
    TrlAsyncGRPOTrainer,
)
from trainer_service.rollout_loop import RemoteLoop
from trainer_service.rollout_worker import EngineTransfer, RolloutWorker
from trainer_service.trainers import AsyncGRPOTrainer


def test_the_signature_is_trls_and_four_keywords() -> None:
    def parameters(function: object) -> dict[str, tuple[object, object]]:
        return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]

    own = {"inference_address": None, "inference_token": None, "vllm_mode": "server", "lora_mode": "merged"}
    expected = parameters(TrlAsyncGRPOTrainer.__init__)
    expected |= {name: (inspect.Parameter.KEYWORD_ONLY, default) for name, default in own.items()}
    assert parameters(AsyncGRPOTrainer.__init__) == expected
    assert list(parameters(AsyncGRPOTrainer.__init__)) == list(expected)


def members(protocol: type) -> set[str]:
    named = {name for name in vars(protocol) if not name.startswith("_")}
    return named | set(inspect.get_annotations(protocol))


def test_the_protocols_are_those_that_are_kept() -> None:
    worker, transfer = _trl_async.module.RolloutWorkerProtocol, _trl_async.module.WeightTransferProtocol
    assert members(worker) == {
        "rollout_buffer",
        "metrics_queue",
        "start",
        "stop",
        "update_model_version",
        "check_health",
    }
    assert members(worker) <= set(dir(RolloutWorker(1, lambda: 0)))
    assert members(transfer) == {"init_weight_transfer", "pause", "send_weights", "resume", "destroy"}
    assert members(transfer) <= set(dir(EngineTransfer))


@pytest.mark.parametrize("name", ["_run_loops", "_generate_one", "_generate_one_turn", "_score_group"])
def test_what_the_loop_overrides_is_there(name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(AsyncRolloutLoop, name))
    assert name in vars(RemoteLoop)


def test_what_the_loop_is_made_of_is_what_trl_makes_it_of() -> None:
    """All arguments of the loop are the worker's, or given to it by the trainer."""
    taken = set(inspect.signature(AsyncRolloutLoop.__init__).parameters) - {"self"}
    shared = {
        "rollout_buffer",
        "model_version_value",
        "heartbeat_value",
        "failed_event",
        "exception_info_queue",
        "metrics_queue",
    }
    sampled = {"vllm_server_url", "lora_name", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty"}
    described = {
        "score_queue_maxsize",
        "model_name",
        "dataset",
        "reward_funcs",
        "processing_class",
        "eos_token_ids",
        "tools",
        "environment_factory",
        "num_generations",
        "max_inflight_tasks",
        "queue_maxsize",
        "temperature",
        "chat_template_kwargs",
        "max_tool_calling_iterations",
        "log_completions",
        "num_completions_to_print",
        "fork_threshold_tokens",
    }
    assert taken == shared | sampled | described | {"request_timeout", "dataset_start_index"}


def test_what_the_trainer_overrides_and_reads_is_there() -> None:
    for name in (
        "_sync_weight_merged",
        "_sync_weight",
        "get_train_dataloader",
        "_load_from_checkpoint",
        "log",
    ):
        assert callable(getattr(TrlAsyncGRPOTrainer, name))
    source = inspect.getsource(TrlAsyncGRPOTrainer)
    for name in ("_rollout_dataset.wait_s", "_trained_groups", "_metrics", "rollout_queue", "eos_token_ids"):
        assert name in source
    assert 'rollout_worker._loop_kwargs["dataset_start_index"]' in source
    assert issubclass(RolloutWorker, AsyncRolloutWorker)
    assert callable(_trl_async.module.get_peak_flops_per_device)


def test_what_the_config_has() -> None:
    names = {field.name for field in fields(AsyncGRPOConfig)}
    assert names >= {
        "max_staleness",
        "token_budget",
        "queue_maxsize",
        "max_inflight_tasks",
        "request_timeout",
        "vllm_server_timeout",
        "heartbeat_stale_after_s",
        "weight_sync_steps",
    }
