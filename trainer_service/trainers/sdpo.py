"""SDPO over an inference service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainer_service._trl_experimental import SDPOConfig, TrlSDPOTrainer
from trainer_service.reaching import Addresses
from trainer_service.rewards import prepared
from trainer_service.trainers.inputs import RewardedMixin, check_config, columns_of
from trainer_service.trainers.mixin import named_after
from trainer_service.trainers.selftaught import SelfTaughtMixin

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback


class SDPOTrainer(SelfTaughtMixin, RewardedMixin, TrlSDPOTrainer):
    """TRL's SDPOTrainer (self-distillation from successful rollouts, https://arxiv.org/abs/2601.20802), with rollouts
    from the inference service at `inference_address`. See SDFTTrainer."""

    def __init__(
        self,
        model: str | PreTrainedModel | torch.nn.Module,
        reward_funcs: Any | list[Any] | None = None,
        args: SDPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        peft_config: PeftConfig | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
    ) -> None:
        """TRL's arguments; the others and the errors are SDFTTrainer's."""
        args = args or SDPOConfig(named_after(model, "SDPO"))
        check_config(args, SDPOConfig)
        columns = columns_of(train_dataset, eval_dataset)
        rewards = prepared(reward_funcs, columns=columns, awaits=False) if reward_funcs else reward_funcs

        def init() -> None:
            super(SDPOTrainer, self).__init__(
                model=model,
                reward_funcs=rewards,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )

        self._start(init, args, inference_address, inference_token)
