"""The memory of an update's messages, as `tiles` has them: each its own where that is little, else used again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weight_transfer.tiles import ENTRY, HEADER

SLOTS = 3
"""Messages in memory at least: one that is filled, one on its way, and one between the two."""
ALL_BYTES = 512 << 20
"""Up to here each message of an update has memory of its own: then nothing is done for each but what must be."""
_ALIGNED = 32  # words: the copies are fastest so


@dataclass(frozen=True)
class Messages:
    """each: the message of each window, int32. slots: after how many of them their memory is used again."""

    each: tuple[torch.Tensor, ...]
    slots: int

    @property
    def apart(self) -> bool:
        """Whether all are there at once."""
        return self.slots == len(self.each)

    def clear(self) -> None:
        """Have the headers of those that are there at once be zero."""
        if self.each:
            torch._foreach_zero_([message[:HEADER] for message in self.each[: self.slots]])

    def counts(self) -> torch.Tensor:
        """How many changes each of those found that are there at once: int64."""
        if not self.each:
            return torch.zeros(0, dtype=torch.int64)
        return unsigned(torch.cat([message[:1] for message in self.each[: self.slots]]))


def messages(
    words: Sequence[int], device: torch.device, memory: torch.Tensor | None = None, *, kept: bool = False
) -> tuple[Messages, torch.Tensor]:
    """Room for messages of so many words each, and the memory that it is in.

    Args:
        memory: what a call before gave, to be used again where it is enough.
        kept: whether all are wanted at once, however large.
    """
    steps = [-(-n // _ALIGNED) * _ALIGNED for n in words]
    slots = len(steps)
    if not kept and ENTRY * sum(steps) > ALL_BYTES:
        slots = min(slots, max(SLOTS, ALL_BYTES // (ENTRY * max(steps))))
        steps = [max(steps)] * slots
    if memory is None or len(memory) < sum(steps):
        memory = torch.empty(sum(steps), dtype=torch.int32, device=device)
    starts = list(itertools.accumulate(steps, initial=0))
    each = tuple(memory[starts[k % slots] :][:n] for k, n in enumerate(words))
    return Messages(each, slots), memory


def unsigned(words: torch.Tensor) -> torch.Tensor:
    """Words of a message, as int64."""
    return words.to(torch.int64) & 0xFFFFFFFF
