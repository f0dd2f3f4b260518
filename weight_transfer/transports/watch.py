"""A sample of memory, to notice writes that nobody announced."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weight_transfer.digest import Digester

_SAMPLE_BYTES = 4096


class Watch:
    """Compares the middle of each tensor with what it was: an optimizer's step changes about every element.

    It looks at the bytes. Autograd's version counters miss fused optimizers, `.data`, and flat buffers that the
    tensors are views of.
    """

    def __init__(self) -> None:
        self._samples: Digester | None = None
        self._seen: torch.Tensor | None = None

    def start(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch these contiguous tensors, all on one device, from now on."""
        self._samples = Digester([_middle(tensor.detach()) for tensor in tensors])
        self.renew()

    def renew(self) -> None:
        """Watch the same tensors, as they are now."""
        self._seen = None if self._samples is None else self._samples.look()

    def changed(self) -> bool:
        """Whether any was written since."""
        if self._samples is None or self._seen is None:
            return False
        return not torch.equal(self._samples.look(), self._seen)

    def stop(self) -> None:
        """Let go of the memory."""
        self._samples = self._seen = None


def _middle(tensor: torch.Tensor) -> torch.Tensor:
    length = min(tensor.numel(), _SAMPLE_BYTES // tensor.element_size())
    return tensor.view(-1).narrow(0, (tensor.numel() - length) // 2, length)
