"""The policy's tensors, listed anew only where the model's parameters are others than they were.

Naming each takes as long as moving a gigabyte on a GPU; to see that they are the same takes a fortieth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import nn

from trainer_service.policy_tensors import policy_tensors
from weight_transfer.transports import SourceTensor

_dtype_of = attrgetter("dtype")
_parameters_of, _children_of, _values_of = (
    attrgetter("_parameters"),
    attrgetter("_modules"),
    methodcaller("values"),
)


class Listing:
    """Lists a model's tensors. Lists of plain parameters it keeps, and thereby these parameters."""

    def __init__(self) -> None:
        self._wanted: Sequence[str] = ()
        self._modules: list[nn.Module] = []
        self._ids: list[int] | None = None  # of what these have; None where that is looked for anew each time
        self._where: list[Any] | None = None  # and in which dtypes; None where the list may not be kept
        self._policy: list[SourceTensor] = []

    def policy(self, model: nn.Module, wanted: Sequence[str]) -> list[SourceTensor]:
        """What `policy_tensors` finds, with its errors. The very same list as before, as long as it holds."""
        kept = self._where is not None and wanted == self._wanted and self.same(model)
        if kept and _where(self._policy) == self._where:
            return self._policy
        self._ids = self._where = None  # what cannot be listed is not the same the next time
        self._policy = policy_tensors(model, frozenset(wanted))
        self._modules, self._wanted = list(model.modules()), wanted
        self._ids = _ids(self._modules)
        if any(type(module).__module__.startswith("peft.") for module in model.modules()):
            self._ids = None  # which adapter is active, parameters don't tell
        elif all(source.parameter is not None for source in self._policy):
            self._where = _where(self._policy)
        return self._policy

    def same(self, model: nn.Module) -> bool:
        """Whether the model has the parameters that were listed last, each in its place, if somebody held on to
        them.
        """
        return self._ids is not None and model is self._modules[0] and _ids(self._modules) == self._ids


def _ids(modules: Sequence[nn.Module]) -> list[int]:
    """Of the parameters and modules that each has, in some order. By functions of C's: a loop takes twice as long."""
    has = chain(map(_parameters_of, modules), map(_children_of, modules))
    return list(map(id, chain.from_iterable(map(_values_of, has))))


def _where(policy: Sequence[SourceTensor]) -> list[Any]:
    parameters: list[Any] = [source.parameter for source in policy]
    return [*map(torch.Tensor.data_ptr, parameters), *map(_dtype_of, parameters)]
