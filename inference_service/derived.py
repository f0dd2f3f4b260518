"""Tensors that attention layers make of weights once these are loaded, and how they are made anew.

Latent attention (MLA) computes with the weight of kv_b_proj cut in two, for keys and for values. Where nothing is
quantized both are views of that weight: what is written there is computed with. Others are copies: a weight that was
dequantized first, one packed for a kernel of a CPU's, sinks in FlashInfer's float32. vLLM makes those again after an
update, and they stay in the memory where they are, whose address captured graphs know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import structlog
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import set_default_torch_dtype

from weight_transfer.arena import Arena

log = structlog.get_logger(__name__)


class Made(NamedTuple):
    """A tensor that the processing of `layer` made, and where it is: an attribute of `holder`."""

    layer: Any
    holder: Any
    name: str
    tensor: torch.Tensor


class Derived:
    """What a model's attention layers make of its weights. Begun before vLLM processes what was loaded.

    made: every such tensor, once `find` has seen them.
    copies: those among them that lie elsewhere than the weights. They are to be renewed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if _processed(module)]
        self._before = [_tensors(holder) for layer in self._layers for holder in _holders(layer)]
        self._weights = {layer: _projection(layer) for layer in self._layers}
        self.made: list[Made] = []
        self.copies: list[Made] = []

    def find(self, arena: Arena) -> None:
        """See what there is now that was not before, while the model's weights lie in `arena`."""
        for layer, weight in self._weights.items():
            _put_back(layer, weight)
        holders = [(layer, holder) for layer in self._layers for holder in _holders(layer)]
        for (layer, holder), before in zip(holders, self._before, strict=True):
            for name, tensor in _tensors(holder).items():
                if tensor is not before.get(name) and tensor.numel():
                    self.made.append(Made(layer, holder, name, tensor))
        self._before.clear()
        # Scales of the key-value cache, which are single numbers, are new too where no checkpoint has them.
        self.copies = [made for made in self.made if made.tensor.ndim and not _lies_in(made.tensor, arena)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of `made` that are parameters now, which no checkpoint has."""
        return [made.tensor for made in self.made if isinstance(made.tensor, nn.Parameter)]

    def renew(self, vllm_config: VllmConfig) -> None:
        """Have vLLM make the copies again of the weights that are there now. Nothing may be computed meanwhile."""
        dtype = cast(torch.dtype, vllm_config.model_config.dtype)
        with torch.no_grad(), set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype):
            for layer in dict.fromkeys(made.layer for made in self.copies):
                with self._in_their_places(layer):
                    layer.process_weights_after_loading(dtype)

    @contextmanager
    def _in_their_places(self, layer: nn.Module) -> Iterator[None]:
        weight, mine = _projection(layer), [made for made in self.copies if made.layer is layer]
        scales = [(holder, *_scales(holder)) for holder in _holders(layer)]
        try:
            yield
            for made in mine:
                if (new := _tensors(made.holder)[made.name]) is not made.tensor:
                    made.tensor.copy_(new)
        finally:
            _put_back(layer, weight)
            for made in mine:
                setattr(made.holder, made.name, made.tensor)
            for holder, numbers, tensors in scales:
                vars(holder).update(numbers)
                for name, (tensor, value) in tensors.items():
                    setattr(holder, name, tensor.copy_(value))

    def why_not(self, vllm_config: VllmConfig) -> str:
        """Why an update could not renew all of them; "" if it can.

        Makes them once, over something else, and compares every bit with what was there, which is there afterwards.
        """
        memory = list(
            {made.tensor.untyped_storage().data_ptr(): _bytes(made.tensor) for made in self.copies}.values()
        )
        kept = [place.to("cpu", copy=True) for place in memory]
        for place in memory:
            place.bitwise_not_()
        try:
            self.renew(vllm_config)
        except Exception as error:
            log.warning("copies of weights cannot be made anew", exc_info=error)
        else:
            if all(torch.equal(place.cpu(), value) for place, value in zip(memory, kept, strict=True)):
                return ""
        for place, value in zip(memory, kept, strict=True):
            place.copy_(value)
        return "attention computes with copies of its weights, of which vLLM does not make the same again"


def why_unknown(model: nn.Module) -> str:
    """Why it is not known what a model with latent attention makes of its weights; "" if it is.

    DeepSeek-V4's attention is another, and some models do things of their own once all is loaded.
    """
    mine = getattr(model, "process_weights_after_loading", None)
    if callable(mine) or not any(isinstance(module, MLAAttention) for module in model.modules()):
        return f"{type(model).__name__} makes something of its own of its weights, which an update would not renew"
    return ""


def _processed(module: nn.Module) -> bool:
    return isinstance(module, AttentionLayerBase) and callable(
        getattr(module, "process_weights_after_loading", None)
    )


def _holders(layer: Any) -> list[Any]:
    """The layer, and vLLM's object behind it, which has no modules."""
    return [layer, layer.impl] if hasattr(layer, "impl") else [layer]


def _tensors(holder: Any) -> dict[str, torch.Tensor]:
    found = dict(vars(holder))
    if isinstance(holder, nn.Module):
        found |= holder._parameters | holder._buffers
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _scales(holder: Any) -> tuple[dict[str, float], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Single numbers that it has, as they are now: vLLM sets those of the key-value cache to 1, calculated or not."""
    numbers = {name: value for name, value in vars(holder).items() if isinstance(value, float)}
    tensors = {name: (tensor, tensor.clone()) for name, tensor in _tensors(holder).items() if not tensor.ndim}
    return numbers, tensors


def _projection(layer: Any) -> nn.Parameter | None:
    """The weight that latent attention cuts in two, where it is the checkpoint's own."""
    linear: Any = getattr(layer, "kv_b_proj", None)
    plain = isinstance(getattr(linear, "quant_method", None), UnquantizedLinearMethod)
    return linear.weight if plain else None


def _put_back(layer: Any, weight: nn.Parameter | None) -> None:
    # Where a kernel of AMX has its own copy, vLLM drops the weight. It lies in the arena all the same.
    now = _projection(layer)
    if weight is not None and now is not None and not now.numel():
        layer.kv_b_proj.weight = weight


def _lies_in(tensor: torch.Tensor, arena: Arena) -> bool:
    return arena.address <= tensor.data_ptr() < arena.address + arena.size


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory behind it."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
