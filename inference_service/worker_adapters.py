"""Adapters whose weights trainers bring, in one of vLLM's workers.

vLLM loads adapters from folders alone, and again whenever it made room for another meanwhile. Those of trainers have no
folder: their weights are held here, and vLLM's loading is led to them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name

Weights = dict[str, torch.Tensor]


class WorkerAdapters:
    """A trainer's adapter has one id for good: what runs with it goes on with the weights that it has now."""

    def __init__(self, loras: Any) -> None:
        """Stand between `loras`, vLLM's WorkerLoRAManager, and its folders."""
        self._loras = loras
        self._held: dict[int, Weights] = {}
        self._prepared: tuple[int, Weights, LoRAModel] | None = None
        self._before: tuple[LoRARequest, Weights | None] | None = None
        load = loras._load_adapter

        def load_adapter(request: LoRARequest) -> Any:
            number = request.lora_int_id
            return self._model(number, self._held[number]) if number in self._held else load(request)

        loras._load_adapter = load_adapter

    def missing(self, modules: list[str]) -> list[str]:
        """Those of `modules`, named as in the checkpoint, to which vLLM cannot add an adapter's share."""
        manager = self._loras._adapter_manager
        known = set(manager.modules) - set(manager.packed_modules)
        known.update(*manager.packed_modules.values())
        mapper = self._mapper()
        return [
            module
            for module in modules
            if parse_fine_tuned_lora_name(f"{module}.lora_A.weight", mapper)[0] not in known
        ]

    def prepare(self, number: int, weights: Weights) -> None:
        """Keep these weights, and make sure that vLLM takes them. Nothing changes yet."""
        self._prepared = self._before = None
        self._prepared = number, weights, self._model(number, weights)

    def swap(self, request: LoRARequest) -> None:
        """Have the adapter of that request be what was prepared. Where that fails, it stays what it was."""
        if self._prepared is None or self._prepared[0] != request.lora_int_id:
            raise RuntimeError(f"no weights were prepared for the adapter {request.lora_name!r}")
        (number, weights, _), self._prepared = self._prepared, None
        self._before = request, self._held.get(number)
        try:
            self._put(request, weights)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Undo the last `swap`, if it was not undone yet."""
        self._prepared = None
        if self._before is not None:
            (request, weights), self._before = self._before, None
            self._put(request, weights)

    def forget(self, number: int) -> None:
        """Let go of an adapter that nothing runs with."""
        self._held.pop(number, None)
        self._loras.remove_adapter(number)

    def _put(self, request: LoRARequest, weights: Weights | None) -> None:
        self.forget(request.lora_int_id)
        if weights is not None:
            self._held[request.lora_int_id] = weights
            self._loras.add_adapter(request)

    def _model(self, number: int, weights: Weights) -> LoRAModel:
        rank = max(weights[name].shape[0] for name in weights if name.endswith(".lora_A.weight"))
        return LoRAModel.from_lora_tensors(
            lora_model_id=number,
            # vLLM changes them in place where it fuses modules.
            tensors={name: tensor.clone() for name, tensor in weights.items()},
            # Their scaling is in lora_B already, whatever made it: rsLoRA, or an alpha of each module's own.
            peft_helper=PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=self._loras.lora_config.lora_dtype,
            weights_mapper=self._mapper(),
        )

    def _mapper(self) -> Any:
        mapper = getattr(self._loras._adapter_manager.model, "hf_to_vllm_mapper", None)
        # Of the mapper that leaves fused modules apart; 0.29 renamed it, and before it came the mapper was used whole.
        for name in ("get_rename_mapper", "get_unstacked_mapper"):
            if hasattr(mapper, name):
                return getattr(mapper, name)()
        return mapper
