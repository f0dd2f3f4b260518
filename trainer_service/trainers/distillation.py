"""On-policy distillation over an inference service."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainer_service._trl_experimental import DistillationConfig, TrlDistillationTrainer
from trainer_service.reaching import Addresses
from trainer_service.trainers.inputs import check_config, columns_of
from trainer_service.trainers.mixin import named_after
from trainer_service.trainers.turns import ToolTurnMixin

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )


class DistillationTrainer(ToolTurnMixin, TrlDistillationTrainer):
    """TRL's DistillationTrainer, with the student's rollouts from the inference service at `inference_address`.

    The teacher is a model in the trainer's process; ServerDistillationTrainer's is a service. See GRPOTrainer for
    `args.vllm_mode`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
    ) -> None:
        """TRL's arguments; the others and the errors are GRPOTrainer's."""
        args = args or DistillationConfig(named_after(model, "Distillation"))
        check_config(args, DistillationConfig)
        columns_of(train_dataset, eval_dataset)

        def init() -> None:
            super(DistillationTrainer, self).__init__(
                model=model,
                teacher_model=teacher_model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
            )

        self._start(init, args, inference_address, inference_token)
