"""The optimizer of parameters in bfloat16: AdamW that keeps what their rounding takes from each step.

A step of AdamW changes a parameter by about the learning rate. In bfloat16, of 8 bits, that is less than half of a
parameter's last bit wherever the parameter is more than some 500 times the learning rate, and it is lost. Kahan's
summation adds what was lost to the next step (`AdamW` of torch-optimi, which keeps it beside the moments).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tandem.errors import invalid

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

#: What transformers calls the AdamW of torch: its default, which differs between builds, and the other.
ADAMW = ("adamw_torch", "adamw_torch_fused")

#: The flag, in `optim_args`, and what it may be.
FLAG = "kahan_sum"
VALUES = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


class OptimizerMixin(_Trainer):
    """For trainers of policies that may be in bfloat16, as they are where the parameters are the engine's memory."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; of parameters in bfloat16, with `optim` left at AdamW, the one that sums as Kahan's summation does.

        `optim_args="kahan_sum=false"` keeps torch's. Not by itself where FSDP or DeepSpeed has the parameters, or an
        optimizer was given: `optim_args="kahan_sum=true"` asks for it with FSDP too.

        Raises:
            InvalidArgument: `kahan_sum` of `optim_args` is neither true nor false; or, as a checkpoint is loaded, its
                optimizer was the other AdamW.
            ImportError: it was asked for, and torch-optimi is not installed.
        """
        model: Any = args[0] if args else kwargs.get("model")
        adamw = (
            self.optimizer is None and self.args.optim in ADAMW
        )  # else it is another's, or accelerate's already
        if adamw and self.optimizer_cls_and_kwargs is None:
            self._choose(cast(nn.Module, model if model is not None else self.model))
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        for group in getattr(optimizer, "param_groups", ()):
            # torch-optimi's own kernels: a CPU has none, and on a GPU they were not tried with the engine's memory.
            if "triton" in group:
                group["triton"] = False
        if adamw and isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_load_state_dict_pre_hook(_same_kind)
        return optimizer

    def _choose(self, model: nn.Module) -> None:
        asked = asked_for(self.args.optim_args)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if asked is None:
            elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled
            if elsewhere or any(isinstance(parameter, DTensor) for parameter in trained):
                return
        if asked is False or not any(parameter.dtype == torch.bfloat16 for parameter in trained):
            return
        try:
            from optimi import AdamW  # type: ignore[import-untyped]
        except ImportError:
            if asked:
                raise
            logger.warning(
                "bfloat16 parameters lose small steps with torch's AdamW; install torch-optimi to keep them"
            )
            return
        given: dict[str, Any] = {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
            "weight_decay": self.args.weight_decay,
        }
        self.optimizer_cls_and_kwargs = (AdamW, given)
        logger.info("parameters in bfloat16: what its rounding takes from a step is added to the next")


def asked_for(optim_args: str | dict[str, Any] | None) -> bool | None:
    """What `optim_args` says of Kahan's summation; None if nothing.

    Raises:
        InvalidArgument: something else than true or false.
    """
    if isinstance(optim_args, dict):
        pairs = {str(name): str(value) for name, value in optim_args.items()}
    else:
        items = (item.partition("=") for item in (optim_args or "").replace(" ", "").split(",") if item)
        pairs = {name: value for name, _, value in items}
    if FLAG not in pairs:
        return None
    value = pairs[FLAG].lower()
    if value not in VALUES:
        raise invalid("optim_args", f"{FLAG} is {pairs[FLAG]!r}, which is neither true nor false")
    return VALUES[value]


def _same_kind(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Refuse the state of the other AdamW, which a checkpoint may have."""
    sums, saved = (FLAG in groups[0] for groups in (optimizer.param_groups, state["param_groups"]))
    if sums != saved:
        raise invalid(
            "optim_args",
            f"the checkpoint's optimizer is not this run's AdamW: with {FLAG}={str(saved).lower()} it goes on",
        )
