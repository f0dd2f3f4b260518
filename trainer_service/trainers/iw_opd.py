"""IW-OPD over an inference service, or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tandem.errors import invalid
from trainer_service._trl_experimental import IWOPDConfig, TrlIWOPDTrainer
from trainer_service.reaching import Addresses
from trainer_service.trainers.inputs import check_config
from trainer_service.trainers.mixin import RemoteMixin
from trainer_service.trainers.slices import SliceMixin
from trainer_service.trainers.taught import TaughtMixin

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


class IWOPDTrainer(TaughtMixin, SliceMixin, TrlIWOPDTrainer):
    """TRL's IWOPDTrainer (Importance-Weighted On-Policy Distillation, https://arxiv.org/abs/2606.22600), with the
    student's rollouts from the inference service at `inference_address`.

    The teacher is a model in the trainer's process, or with `args.use_teacher_server` the service at
    `teacher_address`: see ServerDistillationTrainer.
    """

    _off: ClassVar[dict[str, Any]] = {**RemoteMixin._off, "use_teacher_server": False}
    _flags: ClassVar[str] = "_buffered_on_policy_flags"
    _relied_on: ClassVar[tuple[str, ...]] = (
        *SliceMixin._relied_on,
        "_get_teacher_token_logprobs_from_server",
        "use_teacher_server",
        "teacher_client",
    )

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str | None = None,
        teacher_model: PreTrainedModel | torch.nn.Module | str | None = None,
        args: IWOPDConfig | None = None,
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
        teacher_address: str | None = None,
        teacher_token: str | None = None,
    ) -> None:
        """TRL's arguments; the others and the errors are ServerDistillationTrainer's."""
        args = args or IWOPDConfig(output_dir="tmp_iw_opd")
        check_config(args, IWOPDConfig)
        sampled = args.distillation_objective == "iw_opd"
        # TRL's own check, which it skips while `use_vllm` is off.
        if sampled and args.vllm_sync_frequency != 1:
            raise invalid("vllm_sync_frequency", "must be 1 for distillation_objective='iw_opd'")
        served = args.use_teacher_server
        if teacher_address is not None and not served:
            raise invalid("teacher_address", "is read only with args.use_teacher_server")
        self._logprobs = 0 if sampled else None

        def init() -> None:
            super(IWOPDTrainer, self).__init__(
                model=model,
                teacher_model=None if served else teacher_model,  # type: ignore[arg-type]  # as by default
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
            self.use_teacher_server = served

        if served:
            self._start_taught(init, args, inference_address, inference_token, teacher_address, teacher_token)
        else:
            self._start(init, args, inference_address, inference_token)
