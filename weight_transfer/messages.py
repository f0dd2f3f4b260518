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


class MessageMemory:
    """Memory for one update's messages after another's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.Tensor | None = None

    def of(self, words: Sequence[int], *, kept: bool = False) -> Messages:
        """Messages of so many words each, in the place of those before.

        Args:
            kept: whether all are wanted at once, however large.

        Raises:
            torch.OutOfMemoryError: the device has not as much.
        """
        steps = [-(-n // _ALIGNED) * _ALIGNED for n in words]
        slots, largest = len(steps), max(steps, default=0)
        if not kept and ENTRY * sum(steps) > ALL_BYTES:
            fewer = max(SLOTS, ALL_BYTES // (ENTRY * largest))
            if fewer * largest < sum(steps):
                slots, steps = fewer, [largest] * fewer
        if self._memory is None or len(self._memory) < sum(steps):
            self._memory = None  # first, or there would be both
            self._memory = torch.empty(sum(steps), dtype=torch.int32, device=self._device)
        starts = list(itertools.accumulate(steps, initial=0))
        each = [self._memory[starts[k % slots] :][:n] for k, n in enumerate(words)]
        return Messages(tuple(each), slots)

    def drop(self) -> None:
        """Let go of it."""
        self._memory = None


def unsigned(words: torch.Tensor) -> torch.Tensor:
    """Words of a message, as int64."""
    return words.to(torch.int64) & 0xFFFFFFFF
