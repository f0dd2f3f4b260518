"""GMPO over an inference service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer_service._trl_experimental import GMPOConfig, TrlGMPOTrainer
from trainer_service.reaching import Addresses
from trainer_service.trainers.grpo import GRPOTrainer
from trainer_service.trainers.mixin import named_after

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl.trainer.grpo_trainer import RewardFunc


class GMPOTrainer(GRPOTrainer, TrlGMPOTrainer):
    """TRL's GMPOTrainer (Geometric-Mean Policy Optimization, https://arxiv.org/abs/2507.20673): GRPO in all but the
    loss, which has no importance sampling correction."""

    _config = GMPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: GMPOConfig | None = None,
        *,
        inference_address: Addresses | None = None,
        inference_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        """TRL's arguments, of which `kwargs` are GRPOTrainer's; the others and the errors are GRPOTrainer's."""
        args = args or GMPOConfig(named_after(model, "GMPO"))
        super().__init__(
            model,
            reward_funcs,
            args,
            inference_address=inference_address,
            inference_token=inference_token,
            **kwargs,
        )
