"""Tells where each tensor of a checkpoint lies, from what a Recorder saw and what the parameters hold."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import torch
from torch import nn

from inference_service.recorder import Copy, Recorder
from weight_transfer.arena import Arena
from weight_transfer.digest import digest_tensors
from weight_transfer.manifest import ITEMSIZE, TensorSpec
from weight_transfer.placement import Block, Placement, covered, merged

#: Where a parameter begins and ends, and its dtype.
Span = tuple[int, int, torch.dtype]


class Placer:
    """Places a model's tensors, once it is loaded into `arena`.

    whole: whether this process holds the whole model, not a rank's part of it.
    rewritten: start, end and dtype of parameters which the model computes with in another form now. They are in use.
    derived: parameters that came once all was loaded.
    conflict: what makes updates impossible; "" while nothing does.
    """

    def __init__(
        self,
        arena: Arena,
        model: nn.Module,
        recorder: Recorder,
        *,
        whole: bool,
        rewritten: Iterable[Span] = (),
        derived: Iterable[nn.Parameter] = (),
    ) -> None:
        new = set(derived)
        self.arena = arena
        self.whole = whole
        self.conflict = ""
        self._recorder = recorder
        self._owners: dict[int, str] = {}
        self._rewritten = set(rewritten)
        now = {(p.data_ptr(), p.data_ptr() + p.nbytes, p.dtype) for p in model.parameters() if p not in new}
        self._spans = sorted(now | self._rewritten, key=lambda span: span[:2])
        self._starts = [start for start, _, _ in self._spans]

    def used(self, name: str) -> bool:
        """Whether the engine computes with the tensor.

        Not if it was never read, or only into memory that is out of use by now, such as an output layer's
        which vLLM tied to the embedding after all.
        """
        copies = self._copies(name)
        out_of_use = all(self._in_arena(copy) and not self._dtype(copy) for copy in copies)
        return name in self._recorder.transformed or not out_of_use

    def rewritten(self, name: str) -> bool:
        """Whether the engine computes with another form of it than lies there."""
        return any(self._span(copy) in self._rewritten for copy in self._copies(name))

    def place(self, name: str, tensor: torch.Tensor) -> Placement | None:
        """Where the tensor lies, or None if its copies don't tell, or it isn't there."""
        copies = self._copies(name)
        dtypes = {self._dtype(copy) for copy in copies}
        if name in self._recorder.transformed or len(dtypes) != 1 or "" in dtypes:
            return None
        spec = TensorSpec(name, dtypes.pop(), tuple(tensor.shape))
        placement = Placement(spec, merged(list(map(self._block, copies)), ITEMSIZE[spec.dtype]))
        twice = sum(block.numel for block in placement.blocks) > spec.numel
        if twice or (self.whole and not covered(spec, placement.blocks)):
            return None
        pairs = placement.pairs([self.arena], tensor)
        expected = digest_tensors([source.to(place.dtype) for source, place in pairs])
        if expected != digest_tensors([place for _, place in pairs]):
            return None
        for copy in copies:
            if (owner := self._owners.setdefault(copy.address, name)) != name:
                self.conflict = f"{owner} and {name} were loaded into the same memory"
        return placement

    def _copies(self, name: str) -> list[Copy]:
        return list(dict.fromkeys(copy for copy in self._recorder.copies.get(name, ()) if copy.numel))

    def _in_arena(self, copy: Copy) -> bool:
        return self.arena.address <= copy.address < self.arena.address + self.arena.size

    def _dtype(self, copy: Copy) -> str:
        """The dtype of the parameter that a copy went into; "" if it was none that is in use."""
        span = self._span(copy)
        return str(span[2]).removeprefix("torch.") if span else ""

    def _span(self, copy: Copy) -> Span | None:
        i = bisect.bisect_right(self._starts, copy.address) - 1
        return self._spans[i] if i >= 0 and copy.address < self._spans[i][1] else None

    def _block(self, copy: Copy) -> Block:
        offset = copy.address - self.arena.address
        return Block(0, offset, copy.strides, copy.tensor_offset, copy.tensor_strides, copy.shape)
