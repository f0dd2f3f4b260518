"""On-policy distillation over two inference services: the student's and the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tandem.errors import invalid
from trainer_service._trl_experimental import ServerDistillationConfig, TrlServerDistillationTrainer
from trainer_service.reaching import Addresses
from trainer_service.trainers.inputs import check_config, columns_of
from trainer_service.trainers.taught import TaughtMixin
from trainer_service.trainers.turns import ToolTurnMixin, TurnMixin

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


class ServerDistillationTrainer(TaughtMixin, ToolTurnMixin, TrlServerDistillationTrainer):
    """TRL's ServerDistillationTrainer, with the student's rollouts from the inference service at `inference_address`
    and the teacher's logprobs from the one at `teacher_address`.

    Where `args.temperature` is not 1, the teacher's distribution is of that temperature too, as in TRL with a teacher
    in the process; vLLM's server gives that of 1, whatever TRL asks.
    """

    _relied_on: ClassVar[tuple[str, ...]] = (*TurnMixin._relied_on, "_get_teacher_token_logprobs_from_server")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ServerDistillationConfig | None = None,
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
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        teacher_address: str | None = None,
        teacher_token: str | None = None,
    ) -> None:
        """TRL's arguments, GRPOTrainer's, and:

        Args:
            teacher_address: `unix:///absolute/path` or `host:port`; by default TANDEM_TEACHER_ADDRESS, or else
                `args.teacher_model_server_url`, which then is no URL but such an address.
            teacher_token: the teacher's service's token; by default TANDEM_TEACHER_TOKEN.

        Raises:
            InvalidArgument: as GRPOTrainer; or `loss_top_k` or `temperature` is more than the teacher's service can
                give; or its tokenizer is not the student's; or it is the student's own.
            Unavailable: a service is not serving after `args.vllm_server_timeout` seconds.
        """
        if args is None:
            raise invalid("args", "ServerDistillationTrainer needs its configuration")
        check_config(args, ServerDistillationConfig)
        columns_of(train_dataset, eval_dataset)

        def init() -> None:
            # Not TRL's own of this class: it calls this one, and opens an HTTP client.
            super(TrlServerDistillationTrainer, self).__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
            self.reverse_kl_top_1_mode = args.reverse_kl_top_1_mode
            self.loss_top_k = args.loss_top_k
            self.loss_add_tail = args.loss_add_tail

        self._start_taught(init, args, inference_address, inference_token, teacher_address, teacher_token)
