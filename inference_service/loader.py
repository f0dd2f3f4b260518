"""vLLM model loader that puts the weights into an arena, and notes where every tensor of the checkpoint went.

Registered as load_format "tandem" at import, which vLLM does in each worker before it loads the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from inference_service.placer import Placer
from inference_service.recorder import Recorder
from weight_transfer.arena import Arena, align
from weight_transfer.cuda.devices import require_kernels, uuid_of
from weight_transfer.digest import digest_tensor
from weight_transfer.manifest import TensorSpec
from weight_transfer.parts import PartSums
from weight_transfer.placement import Block, Placement
from weight_transfer.reading import Reading, part_sums
from weight_transfer.write import copy

LOAD_FORMAT = "tandem"


@dataclass
class HeldWeights:
    """What a worker holds of the policy.

    arenas: the parameters' memory, and, where some tensor's way into the parameters could not be recorded, a
        second one with those tensors as the checkpoint has them, from which vLLM's own loading takes them.
    placements: one for each tensor of the checkpoint that this worker reads, by name.
    reloaded: the names of the tensors that lie in the second arena.
    gpu: UUID of the GPU in whose memory the arenas are; "" for host memory.
    reason: why all of these are empty, where they are: the engine would not compute with what is written.
    """

    arenas: list[Arena] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    reloaded: list[str] = field(default_factory=list)
    reason: str = ""
    gpu: str = ""
    loader: ArenaLoader | None = None

    @cached_property
    def reading(self) -> Reading:
        """Digests the tensors, once all are placed."""
        return Reading(self.placements, self.arenas)

    @cached_property
    def sums(self) -> PartSums:
        """Adds up the words of each block that this worker holds."""
        return part_sums(self.placements, self.arenas)

    def reload(self, model: nn.Module) -> None:
        """Have vLLM load the tensors of the second arena into the parameters."""
        where = {p.spec.name: p for p in self.placements}
        with torch.no_grad():
            load: Any = model.load_weights
            load((name, where[name].view(self.arenas)) for name in self.reloaded)


@register_model_loader(LOAD_FORMAT)
class ArenaLoader(DefaultModelLoader):
    """Loads any checkpoint that vLLM's default loader loads."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        load_format = extra.pop("load_format", "auto")
        super().__init__(
            dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config=extra)
        )
        self._recorder: Recorder | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        device = torch.device(self.load_config.device or vllm_config.device_config.device or "cpu")
        if reason := _why_not(device, vllm_config):
            model: Any = super().load_model(vllm_config, model_config, prefix)
            model.tandem = HeldWeights(reason=reason)
            return cast(nn.Module, model)
        with set_default_torch_dtype(cast(torch.dtype, model_config.dtype)):
            with device, _without_memory(device):
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            arena = _rebind(model, device)
            self._recorder = Recorder()
            with self._recorder:
                self.load_weights(model, model_config)
            before = _digest(arena)
            _keep_weights_live(model)
            process_weights_after_loading(model, model_config, device)
            _use_live_weights(model)
            whole = vllm_config.parallel_config.world_size == 1
            changed = _digest(arena) != before or not _all_in(arena, model)
            model.tandem = (
                HeldWeights(reason="vLLM rewrites this model's weights once they are loaded")
                if changed
                else self._held(model, model_config, Placer(arena, model, self._recorder, whole=whole))
            )
            self._recorder = None
        return cast(nn.Module, model.eval())

    def restore(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Write the checkpoint's tensors over the arenas' contents, each where it was seen to go.

        Raises:
            RuntimeError: the checkpoint has changed. By then some tensors are written.
        """
        held = cast(HeldWeights, model.tandem)
        where = {p.spec.name: p for p in held.placements}
        for name, tensor in super().get_all_weights(model_config, model):
            if placement := where.pop(name, None):
                copy(placement.pairs(held.arenas, tensor))
        if where:
            raise RuntimeError(f"the checkpoint has {len(where)} tensors no more, such as {min(where)}")
        if held.reloaded:
            held.reload(model)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        tensors = super().get_all_weights(model_config, model)
        yield from tensors if self._recorder is None else self._recorder.watch(tensors)

    def _held(self, model: nn.Module, model_config: ModelConfig, placer: Placer) -> HeldWeights:
        """Read the checkpoint again, and see what of it lies in the arena, bit for bit."""
        device = placer.arena.device
        held = HeldWeights(
            arenas=[placer.arena], gpu=uuid_of(device) if device.type == "cuda" else "", loader=self
        )
        again: dict[str, torch.Tensor] = {}
        for name, tensor in super().get_all_weights(model_config, model):
            if not placer.used(name):
                continue
            if (placement := placer.place(name, tensor)) is None:
                again[name] = tensor.clone()
            else:
                held.placements.append(placement)
        if placer.conflict:
            return HeldWeights(reason=placer.conflict)
        if again:
            held.arenas.append(_reload_arena(again, held))
        held.placements.sort(key=lambda p: p.spec.name)
        return held


def _why_not(device: torch.device, vllm_config: VllmConfig) -> str:
    if device.type not in ("cpu", "cuda"):
        return f"the engine's weights are on {device.type}, whose memory is not shared"
    if device.type == "cuda":
        try:
            require_kernels()
        except ImportError as error:
            return str(error)
    if vllm_config.model_config.quantization is not None:
        return "the engine's weights are quantized"
    if vllm_config.model_config.use_mla:
        return "the engine computes with products of its weights (MLA), which an update would not renew"
    return ""


@contextmanager
def _without_memory(device: torch.device) -> Iterator[None]:
    """Have new parameters in host memory that nothing touches, so that there never are two copies on the device.

    Their values are none yet: vLLM makes them empty, and checks that the checkpoint fills each.
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type == device.type:
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")

    if device.type == "cpu":  # there such memory costs nothing
        yield
        return
    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()
        torch.cuda.empty_cache()


def _digest(arena: Arena) -> int:
    return digest_tensor(arena.tensor(0, (arena.size,), torch.uint8))


def _all_in(arena: Arena, model: nn.Module) -> bool:
    full = (p for p in model.parameters() if p.numel())
    return all(arena.address <= p.data_ptr() < arena.address + arena.size for p in full)


def _rebind(model: nn.Module, device: torch.device) -> Arena:
    """Move every parameter into one new arena; each gets a storage of its own there."""
    parameters = dict(model.named_parameters())
    offsets, size = {}, 0
    for name, parameter in parameters.items():
        offsets[name] = size
        size += align(parameter.nbytes)
    arena = Arena.create("tandem-weights", max(size, 1), device)
    for name, parameter in parameters.items():
        # `.data`, not a new Parameter: tied modules share the Parameter object, and the loaders hang on it.
        parameter.data = arena.tensor(offsets[name], parameter.shape, parameter.dtype)
    return arena


def _reload_arena(tensors: dict[str, torch.Tensor], held: HeldWeights) -> Arena:
    offsets, size = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = size
        size += align(tensor.nbytes)
    arena = Arena.create("tandem-reload", max(size, 1), held.arenas[0].device)
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        arena.tensor(offsets[name], tensor.shape, tensor.dtype).copy_(tensor)
        shape = tuple(tensor.shape)
        block = Block(1, offsets[name], tensor.stride(), 0, tensor.stride(), shape)
        held.placements.append(Placement(TensorSpec(name, dtype, shape), (block,)))
        held.reloaded.append(name)
    return arena


def _keep_weights_live(model: nn.Module) -> None:
    # On a CPU vLLM packs linear weights into a layout of oneDNN's and drops the originals: what is written
    # afterwards would never be read. This is vLLM's own flag for leaving one as it is.
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            module._cpu_skip_gemm_dispatch = True


def _use_live_weights(model: nn.Module) -> None:
    methods = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), methods):
            module.cpu_linear = torch.nn.functional.linear
