"""TandemWorker for vLLM's CPU worker, with repairs of vLLM 0.31 that seeds and adapters need there.

Seeds. A prompt too long for one step is prefilled in pieces, and after each piece but the last a sampled token
is thrown away. vLLM then rewinds a seeded request's generator by its offset, which only CUDA's generators have:
any such request would kill the engine. Here the generator's state is put back instead.

Adapters. A row of a batch that has none has the index -1, by which vLLM's PyTorch code takes the last adapter
(vllm#48421, #49656): rollouts without an adapter would be sampled with somebody else's. And what an adapter adds
to the logits is found by a mapping of sampled tokens alone, so that Score, which is about prompt tokens, would kill
the engine. The service takes no adapter that adds to them.
"""

from __future__ import annotations

from typing import Any

from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from inference_service.worker import TandemWorker


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


def _repair_adapters(punica: Any, operations: Any) -> None:
    shrink = operations.bgmv_shrink

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, rows: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, rows, scaling)
        output[rows < 0] = 0

    def add_lora_logits(self: Any, *args: Any, **kwargs: Any) -> None:
        """Add nothing."""

    operations.bgmv_shrink = punica.bgmv_shrink = bgmv_shrink
    punica.PunicaWrapperCPU.add_lora_logits = add_lora_logits


_repair_seeds(CPUModelRunner)
_repair_adapters(punica_cpu, lora_ops)
