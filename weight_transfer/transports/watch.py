"""A sample of memory, to notice writes that nobody announced."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weight_transfer import digest as digests

_SAMPLE_BYTES = 4096


class Watch:
    """Compares the middle of each tensor with what it was: an optimizer's step changes about every element.

    It looks at the bytes. Autograd's version counters miss fused optimizers, `.data`, and flat buffers that the
    tensors are views of.
    """

    def __init__(self) -> None:
        self._samples: list[torch.Tensor] = []
        self._digests: list[int] = []

    def start(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch these contiguous tensors, all on one device, from now on."""
        self._samples = [_middle(tensor.detach()) for tensor in tensors]
        self.renew()

    def renew(self) -> None:
        """Watch the same tensors, as they are now."""
        self._digests = digests.digest_tensors(self._samples)

    def changed(self) -> bool:
        """Whether any was written since."""
        return digests.digest_tensors(self._samples) != self._digests

    def stop(self) -> None:
        """Let go of the memory."""
        self._samples, self._digests = [], []


def _middle(tensor: torch.Tensor) -> torch.Tensor:
    length = min(tensor.numel(), _SAMPLE_BYTES // tensor.element_size())
    return tensor.view(-1).narrow(0, (tensor.numel() - length) // 2, length)
