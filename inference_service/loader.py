"""vLLM model loader that puts the weights into an arena, and notes where every tensor of the checkpoint went.

Registered as load_format "tandem" at import, which vLLM does in each worker before it loads the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import structlog
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

from inference_service.derived import Derived, why_unknown
from inference_service.launch import FIXED
from inference_service.placer import Placer
from inference_service.quantizing import load_whole, why_not_experts, why_not_quantizing
from inference_service.recorder import Recorder
from inference_service.rewritten import Loaded, Rewritten
from weight_transfer.arena import Arena, align
from weight_transfer.cuda.devices import require_kernels, uuid_of
from weight_transfer.digest import digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.parts import PartSums
from weight_transfer.placement import Block, Placement
from weight_transfer.reading import Reading, part_sums
from weight_transfer.write import copy

log = structlog.get_logger(__name__)

LOAD_FORMAT = "tandem"


@dataclass
class HeldWeights:
    """What a worker holds of the policy.

    arenas: the parameters' memory, and, where some tensor's way into the parameters could not be recorded, a
        second one with those tensors as the checkpoint has them.
    placements: one for each tensor of the checkpoint that this worker reads, by name.
    reloaded: the names of the tensors that vLLM's own loading takes from there: those in the second arena, and those
        of the modules that are rewritten.
    rewritten: those modules, if there are any.
    derived: what attention makes of them besides.
    gpu: UUID of the GPU in whose memory the arenas are; "" for host memory.
    asleep: whether vLLM's own memory may not be on the device. The arenas always are.
    stale: whether what vLLM made of the weights is to be made anew, since they were written.
    reason: why all of these are empty, where they are: the engine would not compute with what is written.
    """

    arenas: list[Arena] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    reloaded: list[str] = field(default_factory=list)
    rewritten: Rewritten | None = None
    derived: Derived | None = None
    reason: str = ""
    gpu: str = ""
    loader: ArenaLoader | None = None
    asleep: bool = False
    stale: bool = False

    @property
    def reloads(self) -> bool:
        """Whether vLLM has to do something before it computes with what was written."""
        return bool(self.reloaded or (self.derived and self.derived.copies))

    @cached_property
    def reading(self) -> Reading:
        """Digests the tensors, once all are placed."""
        return Reading(self.placements, self.arenas)

    @cached_property
    def sums(self) -> PartSums:
        """Adds up the words of each block that this worker holds."""
        return part_sums(self.placements, self.arenas)

    def reload(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """Have vLLM make of what was written what it computes with. Nothing may be computed meanwhile.

        Of a worker that sleeps, what vLLM made has no memory on the device: then `wake` does it.
        """
        self.stale = True
        if not self.asleep:
            self._reload(model, vllm_config)
            self.stale = False

    def wake(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """The device has all of the worker's memory again."""
        self.asleep = False
        if self.stale:
            self.reload(model, vllm_config)

    def _reload(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        where = {p.spec.name: p for p in self.placements}
        loading = self.rewritten.loading(vllm_config) if self.rewritten else nullcontext()
        if self.reloaded:
            with torch.no_grad(), loading:
                load: Any = model.load_weights
                load((name, where[name].gather(self.arenas)) for name in self.reloaded)
        if self.derived:
            self.derived.renew(vllm_config)


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
                load_whole(model)
            arena = _rebind(model, device)
            loaded = Loaded(model)
            self._recorder = Recorder()
            with self._recorder:
                self.load_weights(model, model_config)
            loaded.mark()
            _keep_weights_live(model)
            derived = Derived(model)
            process_weights_after_loading(model, model_config, device)
            derived.find(arena)
            _use_live_weights(model)
            whole = vllm_config.parallel_config.world_size == 1
            rewritten = loaded.rewritten(model, derived.parameters)
            placer = Placer(
                arena,
                model,
                self._recorder,
                whole=whole,
                rewritten=rewritten.spans,
                derived=derived.parameters,
            )
            held = self._held(model, model_config, placer, rewritten)
            if rewritten.modules and not held.reason:
                held = _reloading(held, model, vllm_config)
            model.tandem = _renewing(held, derived, model, vllm_config)
            self._recorder = None
        return cast(nn.Module, model.eval())

    def restore(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """Write the checkpoint's tensors over the arenas' contents, each where it was seen to go.

        Raises:
            RuntimeError: the checkpoint has changed. By then some tensors are written.
        """
        held = cast(HeldWeights, model.tandem)
        where = {p.spec.name: p for p in held.placements}
        for name, tensor in super().get_all_weights(vllm_config.model_config, model):
            if placement := where.pop(name, None):
                copy(placement.pairs(held.arenas, tensor))
        if where:
            raise RuntimeError(f"the checkpoint has {len(where)} tensors no more, such as {min(where)}")
        if held.reloads:
            held.reload(model, vllm_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        tensors = super().get_all_weights(model_config, model)
        yield from tensors if self._recorder is None else self._recorder.watch(tensors)

    def _held(
        self, model: nn.Module, model_config: ModelConfig, placer: Placer, rewritten: Rewritten
    ) -> HeldWeights:
        """Read the checkpoint again, and see what of it lies in the arena, bit for bit."""
        device = placer.arena.device
        held = HeldWeights(
            arenas=[placer.arena], gpu=uuid_of(device) if device.type == "cuda" else "", loader=self
        )
        again: dict[str, torch.Tensor] = {}
        for name, tensor in super().get_all_weights(model_config, model):
            if not placer.used(name):
                continue
            placement, reloads = placer.place(name, tensor), placer.rewritten(name)
            # vLLM loads whole tensors, of which a rank's parameters have a part.
            if placement is None or (reloads and not placer.whole):
                again[name] = tensor.clone()
                continue
            held.placements.append(placement)
            if reloads:
                held.reloaded.append(name)
        if placer.conflict:
            return HeldWeights(reason=placer.conflict)
        if again:
            held.arenas.append(_reload_arena(again, held))
        held.rewritten = rewritten if rewritten.modules else None
        held.placements.sort(key=lambda p: p.spec.name)
        return held


def _why_not(device: torch.device, vllm_config: VllmConfig) -> str:
    if cast(dict[str, Any], vllm_config.additional_config or {}).get(FIXED):
        return "the service was started with take_updates off"
    if device.type not in ("cpu", "cuda"):
        return f"the engine's weights are on {device.type}, whose memory is not shared"
    if device.type == "cuda":
        try:
            require_kernels()
        except ImportError as error:
            return str(error)
    if vllm_config.model_config.use_mla and vllm_config.model_config.quantization is not None:
        return "the engine quantizes the weights of latent attention (MLA), which was not tried with updates"
    return why_not_quantizing(vllm_config)


@contextmanager
def _without_memory(device: torch.device) -> Iterator[None]:
    """Have new parameters in host memory that nothing touches, so that there never are two copies on the device.

    Their values are none yet: vLLM makes them empty, and checks that the checkpoint fills each. But a scale that the
    checkpoint may lack, which is a single number, says so by its value.
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type == device.type:
            host = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            parameter.data = host if parameter.ndim else parameter.data.to("cpu")

    if device.type == "cpu":  # there such memory costs nothing
        yield
        return
    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()
        torch.cuda.empty_cache()


def _reloading(held: HeldWeights, model: nn.Module, vllm_config: VllmConfig) -> HeldWeights:
    """`held`, if vLLM makes of the tensors that lie there just what it computes with now."""
    reason = "vLLM rewrites this model's weights once they are loaded"
    if held.rewritten is None or vllm_config.lora_config is not None:
        # Adapters are put around the modules, whose weights vLLM then finds no more.
        return HeldWeights(reason=f"{reason}, and does not load them anew where adapters are")
    if why_not := why_not_experts(held.rewritten.modules):
        return HeldWeights(reason=why_not)
    tensors = held.rewritten.tensors()
    before, kept = _digests(tensors), [tensor.to("cpu", copy=True) for tensor in tensors]
    try:
        held.reload(model, vllm_config)
    except Exception as error:
        log.warning("weights cannot be loaded anew", exc_info=error)
    else:
        if _digests(held.rewritten.tensors()) == before:
            return held
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)  # it serves, and cannot be updated
    return HeldWeights(reason=f"{reason}, and does not make the same again")


def _renewing(held: HeldWeights, derived: Derived, model: nn.Module, vllm_config: VllmConfig) -> HeldWeights:
    """`held`, if what attention makes of the weights follows what is written to them."""
    if held.reason:
        return held
    unknown = why_unknown(model) if vllm_config.model_config.use_mla else ""
    if reason := unknown or derived.why_not(vllm_config):
        return HeldWeights(reason=reason)
    held.derived = derived
    return held


def _digests(tensors: list[torch.Tensor]) -> list[int]:
    # One by one: of transposed weights, as kernels have them, a copy is made, and some may have a number on the host.
    return [digest_tensors([tensor])[0] for tensor in tensors]


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
        place = arena.tensor(offsets[name], parameter.shape, parameter.dtype)
        if not parameter.ndim:  # what says that the checkpoint has none
            place.copy_(parameter.data)
        parameter.data = place
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
