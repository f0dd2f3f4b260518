"""RLOO over an inference service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer_service._trl import RLOOConfig, TrlRLOOTrainer, get_config_model_id
from trainer_service.reaching import Addresses
from trainer_service.rewards import prepared
from trainer_service.trainers.groups import RELIED_ON, GroupMixin
from trainer_service.trainers.inputs import RewardedMixin, check_config, columns_of
from trainer_service.trainers.turns import TurnMixin

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
    from trl.trainer.rloo_trainer import RewardFunc


class RLOOTrainer(TurnMixin, GroupMixin, RewardedMixin, TrlRLOOTrainer):
    """TRL's RLOOTrainer, with rollouts from the inference service at `inference_address`. See GRPOTrainer."""

    _relied_on = (*TurnMixin._relied_on, *RELIED_ON)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: RLOOConfig | None = None,
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
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        lora_mode: str = "merged",
    ) -> None:
        """TRL's arguments; the others and the errors are GRPOTrainer's."""
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RLOOConfig(f"{name.split('/')[-1]}-RLOO")

        check_config(args, RLOOConfig)
        columns = columns_of(train_dataset, eval_dataset)
        rewards = prepared(reward_funcs, columns=columns)

        def init() -> None:
            super(RLOOTrainer, self).__init__(
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
            )

        self._lora_mode = lora_mode
        self._start(init, args, inference_address, inference_token)
