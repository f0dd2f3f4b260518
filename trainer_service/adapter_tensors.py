"""A LoRA adapter's own tensors, as the engine takes them when its weights stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer_service.policy_tensors import base_of, clean, source_of, unsupported, unwrap
from trainer_service.shards import gathered, whole, whole_shape
from weight_transfer.transports import SourceTensor

#: Variants of LoRA that vLLM does not compute, by the field of PEFT's LoraConfig that asks for them.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias of its own",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "modules_to_save": "whole modules, in modules_to_save",
    "trainable_token_indices": "trained tokens' embeddings",
    "target_parameters": "bare parameters, in target_parameters",
}


def adapter_tensors(model: nn.Module) -> list[SourceTensor]:
    """List lora_A and lora_B of each module that the active adapter of `model` adapts.

    They are named after the module's weight in the checkpoint. lora_B is scaled as it is read, so that its product with
    lora_A is what the adapter adds, whatever made the scale: rsLoRA, or ranks and alphas of some modules.

    Args:
        model: as `policy_tensors` takes it.

    Raises:
        FailedPrecondition: `model` is trained in any other way, which is named.
    """
    model = unwrap(model)
    base = base_of(model)
    if base is model:
        raise _not_alone("it is no PeftModel")
    adapted: Any = model
    active = list(adapted.active_adapters)
    if len(active) != 1:
        raise _not_alone(f"{len(active)} adapters are active, where one is needed")
    (name,) = active
    _check(name, adapted.peft_config[name])
    found: list[SourceTensor] = []
    trained: set[int] = set()
    for path, module in base.named_modules():
        for part, parameter, read in _parts(module, name, path):
            found.append(source_of(f"{clean(path)}.{part}.weight", parameter, None, read))
            trained.add(id(parameter))
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise _not_alone(f"{path} is trained, which is no part of it")
    return found


def _check(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise _not_alone(f"{name!r} is {kind}, where LoRA is needed")
    for field, what in _VARIANTS.items():
        if getattr(config, field, None):
            raise _not_alone(f"{name!r} has {what}")
    if config.bias != "none":
        raise _not_alone(f"{name!r} has bias={config.bias!r}, which trains biases of the base")


def _parts(module: Any, name: str, path: str) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """What adapter `name` has for a module: which part, the parameter, and how it is read if not as it is."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return
    layer: Any = module
    if not isinstance(module, LoraLayer) or name in layer.lora_embedding_A:
        raise _not_alone(f"{clean(path)} is adapted by {type(layer).__name__}, not as a linear layer")
    if name not in layer.lora_A:
        return
    if name in layer.lora_variant:
        raise _not_alone(f"{clean(path)} is adapted by {type(layer.lora_variant[name]).__name__}")
    first: nn.Parameter = layer.lora_A[name].weight
    if len(whole_shape(first)) != 2 or getattr(layer, "fan_in_fan_out", False):
        raise _not_alone(f"{clean(path)} is no linear layer whose weight is (outputs, inputs)")
    yield "lora_A", first, None
    yield "lora_B", layer.lora_B[name].weight, partial(_scaled, layer, name)


def _scaled(layer: Any, name: str) -> torch.Tensor:
    weight = layer.lora_B[name].weight
    with gathered([weight]), torch.no_grad():
        scaled: torch.Tensor = whole(weight) * layer.scaling[name]
        return scaled


def _not_alone(what: str) -> Any:
    return unsupported(f"it is to be sent as an adapter, but {what}")
