"""Modules whose weights vLLM brings into another form once they are loaded, and how they are loaded anew.

Experts on a CPU are packed, as some kernels of a GPU want theirs; what is quantized while it is loaded is another
tensor afterwards. With what is written then where the checkpoint's tensors went, nobody computes, until vLLM makes
that form of it again. Its layerwise reload does so, and leaves the kernels' own memory where it is.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.utils.torch_utils import set_default_torch_dtype

from weight_transfer.digest import digest_tensors

#: Address, shape, strides and dtype of a parameter.
Home = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class Loaded:
    """A model's parameters as the checkpoint filled them, to see later which of them are so no more.

    Made before the weights are loaded, when every parameter has its place in the arena; `mark` once they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._homes = {module: _homes(module) for module in model.modules()}
        self._parameters = {_home(p): p.data for p in model.parameters() if p.numel()}
        self._marks: dict[Home, int] = {}

    def mark(self) -> None:
        """What lies in the parameters' places now is the checkpoint."""
        self._marks = self._digests()

    def rewritten(self, model: nn.Module, derived: Iterable[nn.Parameter] = ()) -> Rewritten:
        """The modules of `model` that do not compute with the places that the checkpoint went to, as it filled them.

        derived: parameters that came since, and are others' business.
        """
        new = set(derived)
        changed = {home for home, digest in self._digests().items() if digest != self._marks[home]}
        # Another of the places is as good: a tied output layer has the embedding's.
        whole = self._marks.keys() - changed
        found = [
            module
            for module in model.modules()
            if (before := self._homes.get(module, {})).keys() != (now := _homes(module, new)).keys()
            or not whole.issuperset(now.values())
            or any(now[name][1:] != home[1:] for name, home in before.items())
        ]
        spans = {home for module in found for home in self._homes.get(module, {}).values()}
        return Rewritten(found, spans)

    def _digests(self) -> dict[Home, int]:
        return dict(zip(self._parameters, digest_tensors(list(self._parameters.values())), strict=True))


class Rewritten:
    """The modules of a model that are rewritten.

    spans: the memory into which their tensors were loaded: its first address, the one behind it, and its dtype.
    """

    def __init__(self, modules: list[nn.Module], homes: Iterable[Home]) -> None:
        self.modules = modules
        self.spans = {
            (start, start + shape.numel() * dtype.itemsize, dtype) for start, shape, _, dtype in homes
        }

    def tensors(self) -> list[torch.Tensor]:
        """What they compute with."""
        own = [(*module.parameters(recurse=False), *module.buffers(recurse=False)) for module in self.modules]
        return [tensor.detach() for tensors in own for tensor in tensors]

    @contextmanager
    def loading(self, vllm_config: VllmConfig) -> Iterator[None]:
        """Around `model.load_weights` of all their tensors. Nothing may be computed meanwhile.

        What fails in between leaves each of them with its old weights, or its new ones.
        """
        # vLLM's functions ask for the modules alone.
        modules: Any = SimpleNamespace(modules=lambda: iter(self.modules))
        config = vllm_config.model_config
        with (
            set_current_vllm_config(vllm_config),
            set_default_torch_dtype(cast(torch.dtype, config.dtype)),
            _keeping_kernels(self.modules),
        ):
            try:
                initialize_layerwise_reload(modules)
                yield
                finalize_layerwise_reload(modules, config)  # type: ignore[no-untyped-call]
            except BaseException:
                for module in self.modules:
                    info = get_layerwise_info(module)
                    info.loaded_weights.clear()
                    info.load_numel = 0
                finalize_layerwise_reload(modules, config)  # type: ignore[no-untyped-call]
                raise


@contextmanager
def _keeping_kernels(modules: list[nn.Module]) -> Iterator[None]:
    # vLLM makes the kernel of experts anew, and it reads their scales in memory of the reload's. Graphs read them
    # where the first one does, which is where the reload leaves the new values: so that one is put back.
    # On a CPU vLLM packs experts where it makes their kernel, which it does once: the second time it would leave
    # them as they are loaded. So there is none while they are, and then the old one again.
    kept: list[tuple[Any, Any, Any]] = []
    for module in modules:
        method: Any = getattr(module, "quant_method", None)
        packs = isinstance(method, UnquantizedFusedMoEMethod) and _on_cpu(module)
        if packs or _reads_own(getattr(method, "moe_quant_config", None), module):
            kept.append((method, method.moe_kernel, method.moe_quant_config))
        if packs:
            method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel, config in kept:
            method.moe_kernel, method.moe_quant_config = kernel, config


def _reads_own(config: Any, module: nn.Module) -> bool:
    """Whether a kernel's configuration has tensors, and all are the module's own."""
    own = {t.data_ptr() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    found = {tensor.data_ptr() for tensor in _tensors(config)}
    return bool(found) and found <= own


def _tensors(config: Any) -> Iterator[torch.Tensor]:
    if isinstance(config, torch.Tensor):
        yield config
    elif is_dataclass(config):
        for field in fields(config):
            yield from _tensors(getattr(config, field.name))


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters(recurse=False))


def _home(parameter: torch.Tensor) -> Home:
    return parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype


def _homes(module: nn.Module, but: Container[nn.Parameter] = ()) -> dict[str, Home]:
    """Of the module's own parameters that have any element."""
    own = module.named_parameters(recurse=False)
    return {name: _home(p) for name, p in own if p.numel() and p not in but}
