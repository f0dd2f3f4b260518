"""Rollouts of the geometric mixture of policy and reference, sampled by the engine.

Nash-MD (Munos et al. 2023, https://arxiv.org/abs/2312.00886) samples from the distribution proportional to
policy^(1 - c) * reference^c, token by token; XPO (Xie et al. 2024, https://arxiv.org/abs/2405.21046) from the reference
alone, which is c = 1. The mixture is made of logits, before temperature, penalties and truncation: it is exact, costs
one forward pass of the reference for each token, and everything else of a request works as it does without.
Speculative sampling would draw the same distribution with fewer passes, but needs both models' whole distributions
at every drafted token, and vLLM lets no such verifier in.

Imported by vLLM in its worker process, and where requests are checked.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from inference_service.launch import COEFFICIENT, REFERENCE
from inference_service.reference import Reference


class _Row:
    """A request that is sampled from the mixture. Its output grows in vLLM's hands."""

    def __init__(self, coefficient: float, prompt: list[int], output: list[int]) -> None:
        self.coefficient = coefficient
        self._prompt, self._output = prompt, output

    def __len__(self) -> int:
        return len(self._prompt) + len(self._output)

    def __bool__(self) -> bool:
        return True

    def last(self) -> int:
        return self._output[-1] if self._output else self._prompt[-1]

    def tokens(self) -> list[int]:
        return [*self._prompt, *self._output]


class Mixture(LogitsProcessor):
    """Mixes the reference's logits into those of the requests that ask for it."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        config: Any = vllm_config.model_config
        extra: Any = vllm_config.additional_config
        self._reference = Reference(extra[REFERENCE], config.dtype, device, config.get_vocab_size())
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """No: it runs for greedy requests too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests through vLLM's batch."""

        def row(params: Any, prompt: list[int] | None, output: list[int]) -> _Row | None:
            coefficient = (params.extra_args or {}).get(COEFFICIENT)
            return _Row(coefficient, prompt or [], output) if coefficient else None

        process_dict_updates(self._rows, batch_update, row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits`, (requests, vocabulary) in float32, changed in place."""
        places = sorted(index for index in self._rows if index < len(logits))
        if not places:
            return logits
        rows = [self._rows[index] for index in places]
        coefficients = torch.tensor([[row.coefficient] for row in rows], device=logits.device)
        at = torch.tensor(places, device=logits.device)
        policy, reference = logits[at], self._reference.logits(rows).to(logits.dtype)
        mixed = (1 - coefficients) * policy + coefficients * reference
        # What may not be sampled, by a grammar or a list, still may not.
        logits[at] = mixed.masked_fill(policy == -torch.inf, -torch.inf)
        return logits
