"""vLLM model loader that puts the weights into an arena, and notes where every tensor of the checkpoint went.

Registered as load_format "tandem" at import, which vLLM does in each worker before it loads the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from inference_service.recorder import Copy, Recorder
from weight_transfer.arena import Arena, align
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement
from weight_transfer.scatter import scatter

LOAD_FORMAT = "tandem"


@dataclass
class HeldWeights:
    """What a worker holds of the policy.

    arenas: the parameters' memory, and, where some tensor's way into the parameters could not be recorded, a second
        arena with those tensors as the checkpoint has them: vLLM's own loading takes them from there at a commit.
    placements: one for each tensor of the checkpoint that this worker reads, by name.
    reloaded: the names of the tensors that lie in the second arena.
    """

    arenas: list[Arena] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    reloaded: list[str] = field(default_factory=list)
    loader: ArenaLoader | None = None

    def reload(self, model: nn.Module) -> None:
        """Have vLLM load the tensors of the second arena into the parameters."""
        where = {p.spec.name: p for p in self.placements}
        with torch.no_grad():
            model.load_weights((name, where[name].view(self.arenas)) for name in self.reloaded)


@register_model_loader(LOAD_FORMAT)
class ArenaLoader(DefaultModelLoader):
    """Loads any checkpoint that vLLM's default loader loads."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        load_format = extra.pop("load_format", "auto")
        super().__init__(
            dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config=extra)
        )
        self.recorder: Recorder | None = None
        self.unrecorded: dict[str, torch.Tensor] = {}

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        if device.type != "cpu" or model_config.quantization is not None:
            model = super().load_model(vllm_config, model_config, prefix)
            model.tandem = HeldWeights()
            return model
        with set_default_torch_dtype(model_config.dtype):
            with device:
                model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
            # Before anything is loaded: the parameters' own memory was never touched, so there is never a second copy.
            arena = _rebind(model)
            self.recorder = Recorder()
            with self.recorder:
                self.load_weights(model, model_config)
            held = _held(arena, self.recorder, self.unrecorded, model)
            self.recorder, self.unrecorded = None, {}
            _keep_weights_live(model)
            process_weights_after_loading(model, model_config, device)
            _use_live_weights(model)
        held.loader = self
        model.tandem = held
        return model.eval()

    def restore(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Write the checkpoint's tensors over the arenas' contents, each where it was seen to go."""
        held: HeldWeights = model.tandem
        where = {p.spec.name: p for p in held.placements}
        for name, tensor in super().get_all_weights(model_config, model):
            if name in where:
                scatter(where[name].pairs(held.arenas, tensor))
        if held.reloaded:
            held.reload(model)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        tensors = super().get_all_weights(model_config, model)
        if (recorder := self.recorder) is None:
            yield from tensors
            return
        for name, tensor in recorder.watch(tensors):
            yield name, tensor
            if not recorder.kept(name):
                self.unrecorded[name] = tensor.clone()


def _rebind(model: nn.Module) -> Arena:
    """Move every parameter into one new arena; each gets a storage of its own there."""
    parameters = dict(model.named_parameters())
    offsets, size = {}, 0
    for name, parameter in parameters.items():
        offsets[name] = size
        size += align(parameter.nbytes)
    arena = Arena.create("tandem-weights", max(size, 1))
    for name, parameter in parameters.items():
        # `.data`, not a new Parameter: tied modules share the Parameter object, and the loaders hang on it.
        parameter.data = arena.tensor(offsets[name], parameter.shape, parameter.dtype)
    return arena


def _held(
    arena: Arena, recorder: Recorder, unrecorded: dict[str, torch.Tensor], model: nn.Module
) -> HeldWeights:
    dtypes = {
        p.data_ptr(): (p.data_ptr() + p.nbytes, str(p.dtype).removeprefix("torch."))
        for p in model.parameters()
    }
    held = HeldWeights(arenas=[arena])
    again = dict(unrecorded)
    for name in sorted(recorder.copies):
        copies = recorder.copies[name]
        if name in again or not copies:  # without copies and not transformed: vLLM has no use for it
            continue
        owner = next(
            (dtype for start, (end, dtype) in dtypes.items() if start <= copies[0].address < end), None
        )
        if owner is None:
            raise RuntimeError(f"{name} was loaded into memory that is no parameter's")
        spec = TensorSpec(name, owner, recorder.shapes[name])
        held.placements.append(Placement(spec, tuple(_block(arena, copy) for copy in copies)))
    if again:
        held.arenas.append(_reload_arena(again, held))
    held.placements.sort(key=lambda p: p.spec.name)
    return held


def _block(arena: Arena, copy: Copy) -> Block:
    offset = copy.address - arena.address
    if not 0 <= offset < arena.size:
        raise RuntimeError("a tensor was copied outside the arena")
    return Block(0, offset, copy.strides, copy.tensor_offset, copy.tensor_strides, copy.shape)


def _reload_arena(tensors: dict[str, torch.Tensor], held: HeldWeights) -> Arena:
    offsets, size = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = size
        size += align(tensor.nbytes)
    arena = Arena.create("tandem-reload", max(size, 1))
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
    # On a CPU vLLM packs linear weights into a layout of oneDNN's and drops the originals: what is written afterwards
    # would never be read. This is vLLM's own flag for leaving one as it is.
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            module._cpu_skip_gemm_dispatch = True


def _use_live_weights(model: nn.Module) -> None:
    methods = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), methods):
            module.cpu_linear = torch.nn.functional.linear
