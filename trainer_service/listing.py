"""The policy's tensors, listed anew only where the model's parameters are others than they were.

Naming each takes as long as moving a gigabyte on a GPU; to see that they are the same takes a twentieth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from trainer_service.policy_tensors import policy_tensors
from weight_transfer.transports import SourceTensor

_dtype_of = attrgetter("dtype")


class Listing:
    """Lists a model's tensors. Lists of plain parameters it keeps, and thereby these parameters."""

    def __init__(self) -> None:
        self._wanted: Sequence[str] = ()
        self._ids: list[int] | None = None
        self._where: list[Any] | None = None  # and in which dtypes; None where the list may not be kept
        self._policy: list[SourceTensor] = []

    def policy(self, model: nn.Module, wanted: Sequence[str]) -> list[SourceTensor]:
        """What `policy_tensors` finds, with its errors. The very same list as before, as long as it holds."""
        parameters = _parameters(model)
        ids = list(map(id, parameters))
        same = self._where is not None and (wanted, ids) == (self._wanted, self._ids)
        if same and _where(self._policy) == self._where:
            return self._policy
        self._wanted, self._ids, self._where = wanted, ids, None
        self._policy = policy_tensors(model, frozenset(wanted))
        if any(type(module).__module__.startswith("peft.") for module in model.modules()):
            self._ids = None  # which adapter is active, parameters don't tell
        elif all(source.parameter is not None for source in self._policy):
            self._where = _where(self._policy)
        return self._policy

    def same(self, model: nn.Module) -> bool:
        """Whether the model has the parameters that were listed last, each in its place, if somebody held on to
        them.
        """
        return self._ids is not None and list(map(id, _parameters(model))) == self._ids


def _parameters(model: nn.Module) -> list[nn.Parameter | None]:
    """Each where it stands, in some order: `named_parameters` takes ten times as long."""
    found: list[nn.Parameter | None] = []
    modules = [model]
    while modules:
        module = modules.pop()
        found.extend(module._parameters.values())
        modules.extend(child for child in module._modules.values() if child is not None)
    return found


def _where(policy: Sequence[SourceTensor]) -> list[Any]:
    parameters: list[Any] = [source.parameter for source in policy]
    return [*map(torch.Tensor.data_ptr, parameters), *map(_dtype_of, parameters)]
