"""TandemWorker for vLLM's CPU worker, with two repairs of vLLM 0.31. Without them one request could kill the engine.

Seeds. A prompt too long for one step is prefilled in pieces, and after each piece but the last a sampled token is
thrown away. vLLM then rewinds a seeded request's generator by its offset, which only CUDA's generators have. Here
the generator's state is put back instead.

Adapters. vLLM adds an adapter's share to the logits by a mapping that covers sampled tokens alone, and fails on prompt
tokens, whose logits Score is about. The service takes no adapter that has such a share: there is nothing to add.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from inference_service import orphans
from inference_service.worker import TandemWorker

orphans.end_with_service()


class TandemCpuWorker(TandemWorker):
    """Mixed into vLLM's CPU worker."""


def _discarded(runner: Any) -> dict[int, Any]:
    """The generators, by row of the batch, of requests whose sampled token is thrown away in this step."""
    generators: dict[int, Any] = runner.input_batch.generators
    if not generators:
        return {}
    mask = runner.discard_request_mask.np
    return {row: generator for row, generator in generators.items() if mask[row]}


def _repair_seeds(runner: Any) -> None:
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in _discarded(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = _discarded(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync


def _repair_adapters(punica: Any) -> None:
    def add_lora_logits(self: Any, *args: Any, **kwargs: Any) -> None:
        """Add nothing."""

    punica.add_lora_logits = add_lora_logits


_repair_seeds(CPUModelRunner)
_repair_adapters(PunicaWrapperCPU)
