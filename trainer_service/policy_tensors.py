"""The policy's tensors under the names that its checkpoint has, found in the model as it is now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tandem.errors import FailedPrecondition, Reason
from trainer_service.checkpoint_names import Piece, checkpoint_pieces
from trainer_service.cuts import Cut
from trainer_service.shards import gathered, is_sharded, whole, whole_shape
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import contiguous_strides
from weight_transfer.transports import SourceTensor

#: Name, tensor, and identity of the tensor's owner: equal where parameters are tied.
Walk = Iterator[tuple[str, SourceTensor, int]]


class _Everything:
    """Contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


#: As `wanted`: tied tensors and buffers, whatever their names.
EVERYTHING: Any = _Everything()
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def policy_tensors(
    model: nn.Module, wanted: Container[str] = (), *, merged: bool = True
) -> list[SourceTensor]:
    """List the tensors of `model`: each parameter once, and what else `wanted` names, tied or a buffer.

    LoRA adapters are merged into fresh tensors, one at a time, as they are read; the model itself is never
    written. Frozen parameters are listed like any other. What is spread over ranks (FSDP2, ZeRO-3) is gathered as it
    is read, for which every rank must read the same tensor.

    Args:
        model: as the trainer holds it; wrappers of DDP and of torch.compile are looked through.
        wanted: names in the engine's manifest.
        merged: whether LoRA adapters are merged, or left out.

    Raises:
        FailedPrecondition: the model is quantized, wrapped by FSDP1, or adapted in a way that cannot be merged.
    """
    base = base_of(unwrap(model))
    found: dict[str, SourceTensor] = {}
    seen: set[tuple[int, int]] = set()
    for source, identity in _named(base, list(_walk(base, "", merged))):
        first, name = identity not in seen, source.name
        if first or name in wanted:
            # A tensor can be a view of one place only: a tied duplicate is written.
            found[name] = source if first else replace(source, parameter=None)
            seen.add(identity)
    for name, buffer in base.named_buffers():
        name = clean(name)
        if name in wanted and name not in found:
            found[name] = source_of(name, buffer, None)
    return list(found.values())


def _named(
    base: nn.Module, walked: list[tuple[str, SourceTensor, int]]
) -> Iterator[tuple[SourceTensor, tuple[int, int]]]:
    """What was found, as the checkpoint has it, and the identity of each."""
    pieces = checkpoint_pieces(base, {name: source.spec.shape for name, source, _ in walked})
    for name, source, identity in walked:
        for piece in pieces[name]:
            yield _cut(source, piece), (identity, piece.offset)


def _cut(source: SourceTensor, piece: Piece) -> SourceTensor:
    """A piece of a tensor, or the tensor itself under the checkpoint's name."""
    spec = replace(source.spec, name=piece.name, shape=piece.shape)
    if spec.shape == source.spec.shape and piece.strides == contiguous_strides(spec.shape):
        return replace(source, spec=spec)
    # A parameter's memory is its own whole: a piece is written, and gathered with the rest of it.
    return replace(source, spec=spec, read=Cut(source, piece), parameter=None, shard=None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of what trains it on several ranks or compiles it."""
    while True:
        if isinstance(model, FullyShardedDataParallel):
            raise unsupported("it is wrapped by FSDP1; fsdp_version 2 is supported")
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def base_of(model: nn.Module) -> nn.Module:
    """The model that PEFT adapts, or the model itself."""
    config, inner = getattr(model, "peft_config", None), getattr(model, "get_base_model", None)
    if config is None or inner is None:
        return model
    for name, adapter in config.items():
        if adapter.is_prompt_learning:
            raise unsupported(f"adapter {name!r} is {adapter.peft_type}, which has no weights to merge")
    base: nn.Module = inner()
    return base


def _walk(module: nn.Module, prefix: str, merged: bool) -> Walk:
    """Every parameter below `module`."""
    if (adapted := _adapted(module)) is not None:
        yield from adapted(module, prefix, merged)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, source_of(prefix + name, parameter, parameter), id(parameter)
    for name, child in module.named_children():
        # Wrappers appear in the modules' names, not in the checkpoint's.
        yield from _walk(child, prefix if name in _WRAPPERS else f"{prefix}{name}.", merged)


def _adapted(module: nn.Module) -> Callable[[Any, str, bool], Walk] | None:
    """The walk for a module that PEFT put in another's place; None for an ordinary one."""
    if not type(module).__module__.startswith("peft."):
        return None
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return _walk_saved
    if isinstance(module, LoraLayer) and type(module).__name__ != "ParamWrapper":
        return _walk_lora
    raise unsupported(f"{type(module).__name__} is not LoRA; only LoRA can be merged for the engine")


def _walk_saved(module: Any, prefix: str, merged: bool) -> Walk:
    saved, active = module.modules_to_save, module.active_adapters
    chosen = saved[active[0]] if merged and active and active[0] in saved else module.original_module
    yield from _walk(chosen, prefix, merged)


def _walk_lora(module: Any, prefix: str, merged: bool) -> Walk:
    base = module.get_base_layer()
    for name, parameter in base.named_parameters(recurse=False):
        read = partial(_merged, module, name) if merged else None
        yield prefix + name, source_of(prefix + name, parameter, None, read), id(parameter)


def _merged(layer: Any, name: str) -> torch.Tensor:
    """The base's parameter `name` with the active adapters merged in, by PEFT's own arithmetic.

    PEFT merges into a stand-in that shares the adapters and has a copy of the base's parameters. Merging into
    the base and out again, as TRL does, changes it: additions in bf16 do not undo themselves.
    """
    with gathered(layer.parameters()):
        return _merged_whole(layer, name)


def _merged_whole(layer: Any, name: str) -> torch.Tensor:
    base = layer.get_base_layer()
    if name != "weight" and not any(layer.lora_bias.values()):
        return plain(base, name).clone()
    stand_in, stand_in_base = copy.copy(layer), copy.copy(base)
    stand_in_base._parameters = {
        key: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
        for key, value in base._parameters.items()
    }
    stand_in._modules = {**layer._modules, "base_layer": stand_in_base}
    stand_in.merged_adapters = list(layer.merged_adapters)
    if not layer.disable_adapters:
        with torch.no_grad():
            stand_in.merge()
    return plain(stand_in_base, name)


def plain(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter's value, whole."""
    return whole(module.get_parameter(name))


def source_of(
    name: str,
    tensor: torch.Tensor,
    parameter: nn.Parameter | None,
    read: Callable[[], torch.Tensor] | None = None,
) -> SourceTensor:
    """`tensor` as what moves: as it is, or as `read` gives it. `parameter` if it may become the engine's memory."""
    if not (tensor.is_floating_point() or parameter is None):
        raise unsupported(f"{name} is quantized to {tensor.dtype}; the engine needs plain weights")
    if hasattr(tensor, "_hp_mapping"):
        # DeepSpeed's ZeRO-1 and 2 and its bf16 optimizer write flat buffers that their parameters are views of.
        # One that became engine memory would be trained no more.
        parameter = None
    shard = None
    if is_sharded(tensor):
        parameter, shard = None, tensor if read is None else None
        read = read or partial(_whole, tensor)
    spec = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), whole_shape(tensor))
    return SourceTensor(spec, read or (lambda: tensor.detach()), parameter, str(tensor.device), shard)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    with gathered([tensor]):
        value = whole(tensor)
        return value.clone() if hasattr(tensor, "ds_id") else value  # ZeRO-3 takes the memory back


def clean(name: str) -> str:
    """A name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in (*_WRAPPERS, "base_layer"))


def unsupported(what: str) -> FailedPrecondition:
    """The error for a policy that cannot be sent, or not in the way asked for."""
    return FailedPrecondition(
        Reason.TRANSPORT_UNAVAILABLE, f"The policy cannot be sent to the engine: {what}."
    )
