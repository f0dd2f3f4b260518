"""How many rollouts a trainer's device has room for at once, beside all that is there already."""

from __future__ import annotations

from typing import Any

import torch

_STEP = 8  # rollouts: a group
_FIRST = 128
_MOST = 2048
_WITHIN = 1 / 16  # of the answer: each try of a large one takes many seconds


def largest_batch(trainer: Any, prompt_tokens: int, new_tokens: int) -> int:
    """How many rollouts' loss and gradients fit: a micro-batch of TRL's GRPO. A multiple of 8; 0 if 8 do not fit.

    There may fit a sixteenth more. To be asked after steps were made, with the optimizer's state in place.
    """
    fits, fails = 0, _FIRST
    while fails <= _MOST and _fits(trainer, fails, prompt_tokens, new_tokens):
        fits, fails = fails, 2 * fails
    fails = min(fails, _MOST + _STEP)
    while fails - fits > max(_STEP, fits * _WITHIN):
        between = (fits + fails) // 2 // _STEP * _STEP
        if _fits(trainer, between, prompt_tokens, new_tokens):
            fits = between
        else:
            fails = between
    return fits


def _fits(trainer: Any, rollouts: int, prompt_tokens: int, new_tokens: int) -> bool:
    model, device = trainer.model, trainer.accelerator.device
    try:
        trainer.compute_loss(model, _inputs(rollouts, prompt_tokens, new_tokens, device)).backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _inputs(rollouts: int, prompt_tokens: int, new_tokens: int, device: torch.device) -> dict[str, Any]:
    """A micro-batch as TRL's GRPO makes it, of tokens that every model knows."""

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(5, 100, (rollouts, length), device=device)

    return {
        "prompt_ids": tokens(prompt_tokens),
        "prompt_mask": torch.ones(rollouts, prompt_tokens, dtype=torch.int64, device=device),
        "completion_ids": tokens(new_tokens),
        "completion_mask": torch.ones(rollouts, new_tokens, dtype=torch.int64, device=device),
        "advantages": torch.randn(rollouts, device=device),
        "importance_sampling_ratio": torch.ones(rollouts, new_tokens, device=device),
        "num_items_in_batch": torch.tensor(float(rollouts * new_tokens), device=device),
    }
