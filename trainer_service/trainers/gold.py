"""GOLD over an inference service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tandem.errors import invalid
from trainer_service._trl_experimental import GOLDConfig, TrlGOLDTrainer
from trainer_service.reaching import Addresses, Services
from trainer_service.trainers.inputs import check_config
from trainer_service.trainers.mixin import named_after
from trainer_service.trainers.slices import SliceMixin

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import PeftConfig
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        FeatureExtractionMixin,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from transformers.trainer_utils import EvalPrediction


class GOLDTrainer(SliceMixin, TrlGOLDTrainer):
    """TRL's GOLDTrainer (General Online Logit Distillation), with the student's rollouts from the inference service at
    `inference_address`. The teacher is a model in the trainer's process, and may have another tokenizer."""

    _flags: ClassVar[str] = "_buffered_on_policy"

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str | None = None,
        teacher_model: PreTrainedModel | torch.nn.Module | str | None = None,
        args: GOLDConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: PeftConfig | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
    ) -> None:
        """TRL's arguments; the others and the errors are GRPOTrainer's, and `args.max_length` must have room in the
        engine."""
        args = args or GOLDConfig(named_after(model, "GOLD"))
        check_config(args, GOLDConfig)

        def init() -> None:
            super(GOLDTrainer, self).__init__(
                model=model,
                teacher_model=teacher_model,  # type: ignore[arg-type]  # TRL's own default is None
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,  # type: ignore[arg-type]  # likewise
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                peft_config=peft_config,
            )

        self._start(init, args, inference_address, inference_token)

    def _attach(self, client: Services, args: Any, transports: Sequence[str]) -> None:
        limit = client.get_model().max_model_len
        # TRL would start its own engine with this length.
        if args.max_length is not None and args.max_length > limit:
            why = f"{args.max_length} is more than the service's max_model_len, {limit}"
            raise invalid("max_length", why)
        super()._attach(client, args, transports)
