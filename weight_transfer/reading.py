"""Digests of tensors where they lie in the engine's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weight_transfer.arena import Arena
from weight_transfer.digest import Digester, digest_tensor
from weight_transfer.parts import PartSums, made_up, why_not_summed
from weight_transfer.placement import Placement


class Reading:
    """Digests the placed tensors as often as it is wanted."""

    def __init__(self, placements: Sequence[Placement], arenas: Sequence[Arena]) -> None:
        """Of tensors in these arenas, whose memory is held from then on."""
        self._placements, self._arenas = list(placements), list(arenas)
        self._whole = [i for i, p in enumerate(placements) if not p.alias_reason(p.spec.dtype)]
        self._digester = Digester([placements[i].view(arenas) for i in self._whole])
        others = set(range(len(self._placements))) - set(self._whole)
        self._summed = sorted(i for i in others if not why_not_summed(placements[i]))
        self._sums = part_sums([placements[i] for i in self._summed], arenas)

    def digests(self) -> list[int]:
        """The digest of each tensor. Those whose parts don't add up are copied, one after the other.

        Raises:
            ValueError: ranks that hold the same part of a tensor hold different values; names it.
        """
        return self.later()()

    def later(self) -> Callable[[], list[int]]:
        """Begin, as `Digester.later`; call the result, in the same stream, for what `digests` returns or raises."""
        begun, adding = self._digester.later(), self._sums.later()

        def finish() -> list[int]:
            found, sums = dict(zip(self._whole, begun(), strict=True)), iter(adding())
            for i in self._summed:
                placement = self._placements[i]
                found[i] = made_up(placement, [next(sums) for _ in placement.blocks])
            for i, placement in enumerate(self._placements):
                if i not in found:
                    found[i] = self._gathered(placement)
            return [found[i] for i in range(len(self._placements))]

        return finish

    def _gathered(self, placement: Placement) -> int:
        tensor = placement.gather(self._arenas)
        if sum(block.numel for block in placement.blocks) > placement.spec.numel:
            for part, place in placement.pairs(self._arenas, tensor):
                if digest_tensor(part) != digest_tensor(place):
                    raise ValueError(f"the ranks hold different values of {placement.spec.name}")
        return digest_tensor(tensor)


def part_sums(placements: Sequence[Placement], arenas: Sequence[Arena]) -> PartSums:
    """Of all blocks of these placements, one after the other, in the arenas."""
    return PartSums(
        (block, place) for p in placements for block, place in zip(p.blocks, p.places(arenas), strict=True)
    )
