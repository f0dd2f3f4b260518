"""Online DPO over an inference service."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from tandem.errors import invalid
from trainer_service._trl_experimental import OnlineDPOConfig, TrlOnlineDPOTrainer
from trainer_service.reaching import Addresses
from trainer_service.rewards import JudgeReward, PairwiseJudge, prepared
from trainer_service.trainers.agreement import agree
from trainer_service.trainers.inputs import Noted, check_config, check_noted, columns_of
from trainer_service.trainers.mixin import replaced
from trainer_service.trainers.pairs import PairMixin, check_schedule

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]
    from peft import PeftConfig
    from transformers import (
        DataCollator,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from transformers.trainer_utils import EvalPrediction
    from trl.experimental.online_dpo.online_dpo_trainer import RewardFunc


class OnlineDPOTrainer(PairMixin, TrlOnlineDPOTrainer):  # type: ignore[misc]  # theirs is narrower
    """TRL's OnlineDPOTrainer (Guo et al. 2024, https://arxiv.org/abs/2402.04792), with both completions of each prompt
    from the inference service at `inference_address`.

    `args.vllm_mode` is as GRPOTrainer has it, and `args.use_vllm` is not read. `beta` may be a list, one for each
    epoch: TRL's own stops with a TypeError there. Evaluation gives the loss and the same statistics as training.
    """

    _config: ClassVar[type] = OnlineDPOConfig

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str,
        ref_model: PreTrainedModel | torch.nn.Module | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: OnlineDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        judge: PairwiseJudge | JudgeReward | None = None,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        lora_mode: str = "merged",
    ) -> None:
        """TRL's arguments, GRPOTrainer's of the service, and:

        Args:
            judge: says which of two completions is better, in place of `reward_funcs`. As a JudgeReward it may give
                probabilities.

        Raises:
            InvalidArgument: as GRPOTrainer; or both of judge and reward_funcs, or neither; or a schedule of `args` that
                has more values than there are epochs.
        """
        if (judge is None) == (reward_funcs is None):
            raise invalid("judge", "give it or reward_funcs, and not both")
        self._check(args)
        columns = columns_of(train_dataset, eval_dataset)
        self._check_columns(columns)
        scorers: Any = reward_funcs
        if judge is not None:
            scorers = [judge if isinstance(judge, JudgeReward) else JudgeReward(judge)]
        rewards: Any = prepared(scorers, columns=columns, awaits=False)
        # Models, and the names of models, stay: TRL loads and prepares them.
        rewards = [one if isinstance(one, str | torch.nn.Module) else Noted(one) for one in rewards]

        def init() -> None:
            super(OnlineDPOTrainer, self).__init__(
                model=model,
                ref_model=ref_model,
                reward_funcs=rewards,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                peft_config=peft_config,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=cast(Any, optimizers),
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )

        self._judged = judge is not None
        self._lora_mode = lora_mode
        self._start(init, args, inference_address, inference_token)

    def _check(self, args: Any) -> None:
        """Refuse a configuration that is not this trainer's, or cannot be."""
        check_config(args, self._config)
        check_schedule("beta", args.beta, args)

    def _check_columns(self, columns: list[str] | None) -> None:
        """Refuse a dataset with columns that this trainer cannot honour."""

    @property
    def beta(self) -> float:
        """This epoch's."""
        return self._scheduled(self._beta)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """TRL's, whose own branch for vLLM loses the mask of the prompts' padding, and the images."""
        with replaced(self.args, {"use_vllm": False}), self._accounted(len(inputs["prompt"])):
            return super().training_step(model, inputs, num_items_in_batch)

    def _calculate_rewards_from_functions(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards, failure = None, None
        try:
            rewards = cast(Any, super())._calculate_rewards_from_functions(*args, **kwargs)
            check_noted(self.reward_funcs)
        except Exception as error:  # noqa: BLE001  # raised by `agree`
            failure = error
        agree(self.accelerator, failure)
        return cast(torch.Tensor, rewards)

    def _generate(self, model: torch.nn.Module, prompts: list[Any], images: list[Any] | None = None) -> Any:
        # Rows as the loss wants them: the first completion of every prompt, then the second.
        batch = self._prompts([*prompts, *prompts], [*images, *images] if images is not None else None)
        ids, mask = self._completions(batch)
        self._rest()
        return batch.ids, batch.mask, ids, mask, batch.vision
