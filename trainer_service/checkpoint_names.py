"""The names that a checkpoint of transformers has for the parameters of its model.

They are not always the model's own: what sees, for one, is `model.language_model.layers.0…` in memory and
`language_model.model.layers.0…` in files, whose names vLLM goes by.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What `save_pretrained` would call each of the model's tensors.

    Args:
        model: without wrappers.
        shapes: of the tensors, by the model's names.

    Returns:
        The checkpoint's names by the model's. A tensor that a checkpoint has in other pieces keeps its own name.
    """
    names = {name: name for name in shapes}
    if not isinstance(model, PreTrainedModel):
        return names
    conversions = getattr(model, "_weight_conversions", None)  # of the checkpoint that it was loaded from
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:
        return names
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    known = {id(tensor): name for name, tensor in tensors.items()}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        if id(tensor) in known:
            names[known[id(tensor)]] = name
    return names
