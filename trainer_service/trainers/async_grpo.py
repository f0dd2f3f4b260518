"""Asynchronous GRPO over an inference service: rollouts are sampled while the policy trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from tandem.errors import invalid
from trainer_service import _trl_async
from trainer_service._trl_async import (
    AsyncGRPOConfig,
    DataCollatorForRollout,
    FixedCountBatcher,
    TokenBudgetBatcher,
    TrlAsyncGRPOTrainer,
)
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.client import PERHAPS_ASLEEP, WRITABLE
from trainer_service.reaching import INFERENCE, Addresses, Services, reached, restore, weights_of
from trainer_service.replicas import Replicas
from trainer_service.rewards import prepared
from trainer_service.rollout_loop import Turns
from trainer_service.rollout_worker import EngineTransfer, RolloutWorker
from trainer_service.sampling import sampling_params
from trainer_service.tokenizers import check_tokenizer
from trainer_service.trainers.fresh import Fresh, Source, Staleness
from trainer_service.trainers.inputs import check_config, columns_of
from trainer_service.trainers.mixin import (
    ADAPTER,
    LORA_MODES,
    TRANSPORTS,
    named_after,
    replaced,
)
from trainer_service.trainers.optimizer import OptimizerMixin
from trainer_service.trainers.tree_attention import register_plain_attention

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl.experimental.async_grpo.async_grpo_trainer import (
        EnvironmentFactory,
        RewardFunc,
        RolloutWorkerProtocol,
        WeightTransferProtocol,
    )

logger = logging.getLogger(__name__)


class AsyncGRPOTrainer(OptimizerMixin, TrlAsyncGRPOTrainer):
    """TRL's AsyncGRPOTrainer, with rollouts and weights by the inference service at `inference_address`.

    Rewards, tools and environments run in threads of this process, and need not be picklable. No sample is trained on
    that is more than `args.max_staleness` weight versions old, by its group's oldest token, at the step that trains on
    it. Trains in one process.
    """

    args: Any
    model: Any
    processing_class: Any
    rollout_worker: Any
    rollout_queue: Any
    weight_transfer: Any
    _rollout_dataset: Any

    def __init__(
        self,
        model: str,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: AsyncGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        rollout_worker: RolloutWorkerProtocol | None = None,
        weight_transfer: WeightTransferProtocol | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        vllm_mode: str = "server",
        lora_mode: str = "merged",
    ) -> None:
        """TRL's arguments, of which `rollout_worker` and `weight_transfer` are the service's parts, and:

        Args:
            inference_address: `unix:///absolute/path` or `host:port`, or several, of replicas; by default
                TANDEM_INFERENCE_ADDRESS, with commas between them.
            inference_token: the service's token; by default TANDEM_INFERENCE_TOKEN.
            vllm_mode: "server": generation goes on while new weights arrive. "colocate": the parameters are the
                engine's memory where they can be, and it stands still for the optimizer's steps.
            lora_mode: as GRPOTrainer's.

        Raises:
            InvalidArgument: there is no address, or an argument that cannot be honoured.
            Unavailable: the service is not serving after `args.vllm_server_timeout` seconds.
        """
        if rollout_worker is not None or weight_transfer is not None:
            field = "weight_transfer" if rollout_worker is None else "rollout_worker"
            raise invalid(field, "is what the service does; TRL's own trainer takes another's")
        args = args or AsyncGRPOConfig(named_after(model, "AsyncGRPO"))
        check_config(args, AsyncGRPOConfig)
        if args.max_staleness < 0:  # every sample would be dropped, for ever
            raise invalid("args.max_staleness", f"must not be negative, is {args.max_staleness}")
        if vllm_mode not in TRANSPORTS:
            raise invalid("vllm_mode", f"{vllm_mode!r} is neither 'colocate' nor 'server'")
        if lora_mode not in LORA_MODES:
            raise invalid("lora_mode", f"{lora_mode!r} is neither 'merged' nor 'adapter'")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise invalid("args", "AsyncGRPOTrainer trains in one process, and WORLD_SIZE is more")
        columns = None if train_dataset is None else columns_of(train_dataset)
        rewards = prepared(reward_funcs, columns=columns)
        if wrong := [one for one in rewards if not callable(one) or isinstance(one, torch.nn.Module)]:
            raise invalid("reward_funcs", f"functions or services are needed, not {type(wrong[0]).__name__}")
        adapter = ADAPTER if lora_mode == "adapter" else ""

        def reach() -> Services:
            return reached(INFERENCE, "inference_address", inference_address, inference_token, vllm_mode)

        self._client = client = reach()
        try:
            info = client.wait_until_serving(args.vllm_server_timeout, accept=WRITABLE)
            if info.state in PERHAPS_ASLEEP:
                client.wake_up()
            if info.logprobs_mode != "processed_logprobs":
                logger.warning(
                    "The service's logprobs_mode is %s, which biases the importance weights. "
                    "Start it with processed_logprobs.",
                    info.logprobs_mode,
                )
            if args.token_budget is None:
                args.token_budget = info.max_model_len
            self.policy_weights = weights_of(
                client,
                lambda: self.model,
                transport=("stream",) if adapter else TRANSPORTS[vllm_mode],
                timeout_s=args.vllm_server_timeout,
                adapter=adapter,
            )
            worker = RolloutWorker(_queue_size(args), self._version)
            with self._started(args):
                super().__init__(
                    model=model,
                    reward_funcs=rewards,
                    args=args,
                    train_dataset=train_dataset,
                    processing_class=processing_class,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    peft_config=peft_config,
                    tools=tools,
                    environment_factory=environment_factory,
                    rollout_worker=worker,
                    weight_transfer=EngineTransfer(self.policy_weights),
                )
            if adapter:
                adapter_tensors(self.model)  # what cannot be sent alone is told now
            check_tokenizer(client, self.processing_class, "processing_class")
            sampling = sampling_params(self._sampling())
        except BaseException:
            client.close()
            raise

        def turns() -> Turns:
            services = reach()  # of its own, which end with it
            if isinstance(services, Replicas) and isinstance(client, Replicas):
                services.holding = client.holding
            return Turns(
                services,
                sampling,
                version=self._version,
                seed=args.seed,
                lora=adapter,
                timeout_s=args.request_timeout,
                patience_s=args.vllm_server_timeout,
            )

        worker.describe(turns, **self._loop_arguments(rewards, tools, environment_factory))

    def _started(self, args: AsyncGRPOConfig) -> Any:
        """Goes around TRL's start, which asks the CUDA device for its name."""
        if torch.cuda.is_available() and not args.use_cpu:
            return nullcontext()
        return replaced(_trl_async.module, {"get_peak_flops_per_device": lambda *_: None})

    def _sampling(self) -> dict[str, Any]:
        """Sampling parameters by vLLM's names."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self.args, name) for name in names} | {
            "max_tokens": self.args.max_completion_length
        }

    def _loop_arguments(self, rewards: Any, tools: Any, environment_factory: Any) -> dict[str, Any]:
        names = (
            "num_generations",
            "max_inflight_tasks",
            "queue_maxsize",
            "temperature",
            "chat_template_kwargs",
            "max_tool_calling_iterations",
            "log_completions",
            "num_completions_to_print",
            "fork_threshold_tokens",
        )
        return {name: getattr(self.args, name) for name in names} | {
            "score_queue_maxsize": 1,  # what waits there grows old as well
            "model_name": "",
            "dataset": self.train_dataset,
            "reward_funcs": rewards,
            "processing_class": self.processing_class,
            "eos_token_ids": self.eos_token_ids,
            "tools": tools,
            "environment_factory": environment_factory,
        }

    def _version(self) -> int:
        """The weight version that was committed last."""
        return self.policy_weights.weight_version

    def _sync_weight_merged(self, t0: float) -> tuple[float, float, float]:
        """TRL's, but for an adapter that it merges into the base, and out of it: in bf16 that leaves another base."""
        self.weight_transfer.send_weights(iter(()))
        self.model_version = self._version()
        return t0, t0, t0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """TRL's, whose loader fetches a micro-batch ahead of the one that is trained on."""
        if self.accelerator.device.type != "cuda":
            register_plain_attention()
        metrics, budget = self._metrics["train"], max(self.args.token_budget, 0)
        staleness = Staleness(self._version, self.args.max_staleness, metrics)
        self._rollout_dataset = Source(self.rollout_queue, staleness, metrics, self._wait)
        count = self.args.per_device_train_batch_size
        batches = (
            TokenBudgetBatcher(self._rollout_dataset, 1, budget, metrics)
            if budget
            else FixedCountBatcher(self._rollout_dataset, 1, count)
        )
        return DataLoader(
            Fresh(batches, staleness),
            batch_size=1,
            collate_fn=DataCollatorForRollout(
                self.processing_class.pad_token_id,
                groups_trained=self._trained_groups,
                metrics=metrics,
                token_budget=budget,
            ),
        )

    def _wait(self) -> None:
        """There is no rollout to train on."""
        self.rollout_worker.check_health(self.args.heartbeat_stale_after_s)
        if self.rollout_worker.lost:
            # It was started again, perhaps, and everybody waits for everybody.
            restore(self.policy_weights, 0.0)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. Where it raises within an optimizer step, the lease of that step is given back."""
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            self.policy_weights.abandon(f"training raised {type(error).__name__}")
            raise

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self.policy_weights.update():
            return super()._load_from_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the committed version."""
        logs["tandem/weight_version"] = float(self._version())
        super().log(logs, start_time)

    def close(self) -> None:
        """End what still runs, and the session with the service. Training cannot go on."""
        self.rollout_worker.stop()
        self.policy_weights.detach()
        self._client.close()


def _queue_size(args: AsyncGRPOConfig) -> int:
    """Samples that may wait: no more than are trained on before they are too old."""
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    useful = max(args.max_staleness, 1) * step
    return min(args.queue_maxsize, useful) if args.queue_maxsize > 0 else useful
