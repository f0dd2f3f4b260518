"""The tensors that a checkpoint of transformers has for the parameters of its model.

Their names are not always the model's own: what sees, for one, is `model.language_model.layers.0…` in memory and
`language_model.model.layers.0…` in files, whose names vLLM goes by. And a layer's experts, which are one parameter in
memory, are many tensors in files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class Piece:
    """A checkpoint's tensor as a part of a contiguous parameter: strides and offset are in elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class _WithoutCopies(TorchFunctionMode):
    """Has what is said to become contiguous stay a view, which tells where it was cut from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def checkpoint_pieces(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """What `save_pretrained` would make of each of the model's tensors.

    Args:
        model: without wrappers.
        shapes: of the tensors, by the model's names.

    Returns:
        The checkpoint's tensors by the model's names. What a checkpoint has otherwise than cut into views keeps its
        own name and shape.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    pieces = {name: [_piece(name, tensor)] for name, tensor in tensors.items()}
    if not isinstance(model, PreTrainedModel):
        return pieces
    conversions = getattr(model, "_weight_conversions", None)  # of the checkpoint that it was loaded from
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:
        return pieces
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    known = {_storage(tensor): name for name, tensor in tensors.items()}
    with _WithoutCopies():
        saved = revert_weight_conversion(model, dict(tensors))
    for name, tensor in saved.items():
        if (source := known.get(_storage(tensor))) is not None:
            found[source].append(_piece(name, tensor))
    for name, cut in found.items():
        if sum(piece.numel for piece in cut) == tensors[name].numel():
            pieces[name] = cut
    return pieces


def _piece(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
