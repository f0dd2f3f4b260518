"""Layers that vLLM quantizes as it loads them, one by one: here they are loaded first and quantized then.

So there is a place for every tensor of the checkpoint, which updates are written to, beside what is computed with.
vLLM makes that anew from it at each commit, as with every module that it rewrites.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
from vllm.model_executor.layers.quantization.online.fp8 import (
    Fp8PerBlockOnlineMoEMethod,
    Fp8PerTensorOnlineMoEMethod,
    Fp8PtpcOnlineMoEMethod,
)
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer

#: Of a checkpoint that is not quantized itself. vLLM 0.26 says fp8 for fp8_per_tensor as well.
_ONLINE = (*ONLINE_QUANT_SHORTHAND_NAMES, "fp8")

_FP8_EXPERTS = (Fp8PerTensorOnlineMoEMethod, Fp8PerBlockOnlineMoEMethod, Fp8PtpcOnlineMoEMethod)


def why_not_quantizing(vllm_config: VllmConfig) -> str:
    """Why an engine of quantized weights takes no updates; "" if it may, or its weights are not quantized."""
    config: Any = vllm_config.model_config
    if config.quantization is None:
        return ""
    # Of a model with several parts, that of its language model's counts too.
    if config.model_arch_config.quantization_config is not None:
        return "the checkpoint's weights are quantized: no trainer has such tensors"
    if config.quantization not in _ONLINE:
        return f"the engine's weights are quantized by {config.quantization}, and cannot be so again"
    if vllm_config.lora_config is not None:
        # Known before anything is loaded: the arena would only keep the memory that quantizing saves.
        return "the engine's weights are quantized, and are not so again where adapters are"
    return ""


def why_not_experts(modules: Iterable[nn.Module]) -> str:
    """Why experts among these modules cannot be quantized again; "" if they can.

    fp8's kernels read their scales where vLLM puts the new ones. Others keep tensors that they made of the first.
    """
    for module in modules:
        method = getattr(module, "quant_method", None)
        if isinstance(method, OnlineMoEMethodBase) and not isinstance(method, _FP8_EXPERTS):
            return "the engine's experts are quantized to something else than fp8, and cannot be so again"
    return ""


def load_whole(model: nn.Module) -> None:
    """Have layers that would be quantized as they are loaded take their weights as others do.

    Their parameters, which had no memory yet, get some.
    """
    layer: Any
    for layer in model.modules():
        info: Any = get_layerwise_info(layer)
        if not info.can_load():
            continue
        materialize_layer(layer, info)
        for parameter in layer.parameters(recurse=False):
            parameter.weight_loader = _get_original_loader(parameter)
        info.reset()
