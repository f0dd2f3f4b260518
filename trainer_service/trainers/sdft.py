"""SDFT over an inference service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer_service._trl_experimental import SDFTConfig, TrlSDFTTrainer
from trainer_service.reaching import Addresses
from trainer_service.trainers.inputs import check_config, columns_of
from trainer_service.trainers.mixin import named_after
from trainer_service.trainers.selftaught import SelfTaughtMixin

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback


class SDFTTrainer(SelfTaughtMixin, TrlSDFTTrainer):
    """TRL's SDFTTrainer (self-distillation from demonstrations, https://arxiv.org/abs/2601.19897), with rollouts from
    the inference service at `inference_address`.

    With `args.use_teacher_server` the same service scores for the teacher, in either `args.vllm_mode`.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | torch.nn.Module,
        args: SDFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
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
        """TRL's arguments; the others and the errors are GRPOTrainer's.

        Raises:
            InvalidArgument: also where `args.use_teacher_server` does not go with another argument, or asks more than
                the service can score.
        """
        args = args or SDFTConfig(named_after(model, "SDFT"))
        check_config(args, SDFTConfig)
        columns_of(train_dataset, eval_dataset)

        def init() -> None:
            super(SDFTTrainer, self).__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )

        self._start(init, args, inference_address, inference_token)
