"""GRPO over an inference service."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tandem.errors import invalid
from trainer_service._trl import GRPOConfig, TrlGRPOTrainer, get_config_model_id
from trainer_service.reaching import Addresses
from trainer_service.rewards import prepared
from trainer_service.trainers.groups import RELIED_ON, GroupMixin
from trainer_service.trainers.inputs import RewardedMixin, check_config, columns_of
from trainer_service.trainers.turns import ToolTurnMixin

if TYPE_CHECKING:
    from datasets import (  # type: ignore[import-untyped]
        Dataset,
        DatasetDict,
        IterableDataset,
        IterableDatasetDict,
    )
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

logger = logging.getLogger(__name__)


class GRPOTrainer(ToolTurnMixin, GroupMixin, RewardedMixin, TrlGRPOTrainer):
    """TRL's GRPOTrainer, with rollouts from the inference service at `inference_address`.

    `args.vllm_mode` "colocate" (TRL's default) needs a service on the same host, and GPU if there is one, to
    share its memory; "server" takes any. `args.use_vllm` is not read: vLLM is in the service.
    """

    _relied_on = (*ToolTurnMixin._relied_on, *RELIED_ON)
    _config: ClassVar[type] = GRPOConfig
    _logprobs = 0  # the sampled token's, for the importance sampling correction

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        lora_mode: str = "merged",
    ) -> None:
        """TRL's arguments, and:

        Args:
            inference_address: `unix:///absolute/path` or `host:port`, or several, of replicas; by default
                TANDEM_INFERENCE_ADDRESS, with commas between them.
            inference_token: the service's token; by default TANDEM_INFERENCE_TOKEN.
            lora_mode: "merged" gives the engine the policy with its LoRA adapter merged in; "adapter" the adapter
                alone, in either `args.vllm_mode`, for an engine with enable_lora that has the base's weights.

        Raises:
            InvalidArgument: there is no address, or an argument that the service cannot honour.
            Unavailable: the service is not serving after `args.vllm_server_timeout` seconds.
        """
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        check_config(args, self._config)
        _check_vespo(args)

        columns = columns_of(train_dataset, eval_dataset)
        rewards = None if reward_funcs is None else prepared(reward_funcs, columns=columns)

        def init() -> None:
            super(GRPOTrainer, self).__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )

        self._lora_mode = lora_mode
        self._start(init, args, inference_address, inference_token)
        if self.vllm_importance_sampling_correction and self.accelerator.is_main_process:
            info = self.vllm_generation.vllm_client.get_server_info()
            if (mode := info["model_config"]["logprobs_mode"]) != "processed_logprobs":
                logger.warning(
                    "The service's logprobs_mode is %s, which biases the importance sampling correction. "
                    "Start it with processed_logprobs, or set vllm_importance_sampling_correction=False.",
                    mode,
                )


def _check_vespo(args: GRPOConfig) -> None:
    # TRL's own check, which it skips while `use_vllm` is off.
    allowed = ("token_truncate", "token_mask")
    if (
        args.loss_type == "vespo"
        and args.vllm_importance_sampling_correction
        and args.vllm_importance_sampling_mode not in allowed
    ):
        mode = args.vllm_importance_sampling_mode
        raise invalid(
            "vllm_importance_sampling_mode", f"VESPO needs one of {', '.join(allowed)}, not {mode!r}"
        )
