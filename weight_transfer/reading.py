"""Digests of tensors where they lie in the engine's memory."""

from __future__ import annotations

from collections.abc import Sequence

from weight_transfer.arena import Arena
from weight_transfer.digest import digest_tensor, digest_tensors
from weight_transfer.placement import Placement


def digests(placements: Sequence[Placement], arenas: Sequence[Arena]) -> list[int]:
    """The digest of each placed tensor. Those in one piece are read at once, the others copied one after the other.

    Raises:
        ValueError: ranks that hold the same part of a tensor hold different values; names it.
    """
    whole = [i for i, p in enumerate(placements) if not p.alias_reason(p.spec.dtype)]
    found = dict(zip(whole, digest_tensors([placements[i].view(arenas) for i in whole]), strict=True))
    for i, placement in enumerate(placements):
        if i not in found:
            found[i] = _gathered(placement, arenas)
    return [found[i] for i in range(len(placements))]


def _gathered(placement: Placement, arenas: Sequence[Arena]) -> int:
    tensor = placement.gather(arenas)
    if sum(block.numel for block in placement.blocks) > placement.spec.numel:
        for part, place in placement.pairs(arenas, tensor):
            if digest_tensor(part) != digest_tensor(place):
                raise ValueError(f"the ranks hold different values of {placement.spec.name}")
    return digest_tensor(tensor)
