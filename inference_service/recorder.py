"""Watches vLLM's own weight loading, to learn where every tensor of a checkpoint goes.

vLLM splits, fuses and pads tensors as each architecture and each tensor-parallel rank needs. What it copies
where, while it loads a checkpoint as always, is the placement table, for any architecture: nobody has to
write one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Copy:
    """A copy of a part of a checkpoint's tensor: where from, in its elements, and to which address."""

    tensor_offset: int
    tensor_strides: tuple[int, ...]
    shape: tuple[int, ...]
    address: int
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the copies out of the tensors that `watch` hands over. Enter it around `model.load_weights`.

    copies: for each tensor's name, the copies made of it, in order.
    transformed: the names of tensors that something else than a view or a plain copy read, so that the copies
        don't tell what became of them.

    It is a witness, not a judge: what it didn't see (a parameter changed after the copy, memory used twice)
    shows when the parameters are compared with the checkpoint afterwards.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.copies: dict[str, list[Copy]] = {}
        self.transformed: set[str] = set()
        self._starts: list[int] = []
        self._sources: list[tuple[int, int, str, int]] = []  # start, end, name, itemsize

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`tensors`, passed on one by one, with a note of each one's address range."""
        for name, tensor in tensors:
            self._note(name, tensor)
            yield name, tensor

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        start = tensor.data_ptr()
        end = start + max(tensor.nbytes, 1)
        # Memory of tensors that are gone is used again: the newest owner of an address counts.
        low = bisect.bisect_right(self._starts, start)
        if low and self._sources[low - 1][1] > start:
            low -= 1
        high = bisect.bisect_left(self._starts, end)
        self._starts[low:high] = [start]
        self._sources[low:high] = [(start, end, name, tensor.element_size())]
        self.shapes[name] = tuple(tensor.shape)
        self.copies[name] = []

    def _source(self, tensor: torch.Tensor) -> tuple[int, int, str, int] | None:
        if tensor.is_meta:
            return None
        address = tensor.data_ptr()
        i = bisect.bisect_right(self._starts, address) - 1
        return self._sources[i] if i >= 0 and address < self._sources[i][1] else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._record(args[0], args[1])
            return result
        storages = {t.untyped_storage().data_ptr() for t in tree_iter(result) if isinstance(t, torch.Tensor)}
        for argument in tree_iter((args, kwargs)):
            if not isinstance(argument, torch.Tensor) or not (source := self._source(argument)):
                continue
            if storages != {argument.untyped_storage().data_ptr()}:  # not a view
                self.transformed.add(source[2])
        return result

    def _record(self, target: torch.Tensor, tensor: torch.Tensor) -> None:
        if not math.prod(tensor.shape) or not (source := self._source(tensor)):
            return
        start, _, name, itemsize = source
        if tensor.shape != target.shape:
            self.transformed.add(name)  # broadcast
            return
        offset = (tensor.data_ptr() - start) // itemsize
        shape, strides = tuple(target.shape), target.stride()
        self.copies[name].append(Copy(offset, tensor.stride(), shape, target.data_ptr(), strides))
