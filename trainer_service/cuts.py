"""A checkpoint's tensors that are pieces of one parameter of the model, and how several are read of one gathering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer_service.checkpoint_names import Piece
from weight_transfer.transports import SourceTensor


@dataclass(frozen=True)
class Cut:
    """Reads a piece of a parameter, which `source` reads whole."""

    source: SourceTensor
    piece: Piece

    def __call__(self) -> torch.Tensor:
        return self.of(self.whole())

    def whole(self) -> torch.Tensor:
        """The parameter as it is now."""
        return self.source.read().contiguous()

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The piece, as a view."""
        return whole.as_strided(
            self.piece.shape, self.piece.strides, whole.storage_offset() + self.piece.offset
        )


class Reader:
    """Reads tensors one after the other. Pieces of one parameter that follow each other are of one gathering of it.

    For that the parameter is held until something else is read, or until `forget`. A reader is for one update: it does
    not see what is written meanwhile.
    """

    def __init__(self, first: Callable[[SourceTensor], None] = lambda source: None) -> None:
        """first: called with a tensor before it, or what it is a piece of, is read; with no other."""
        self._first = first
        self._source: SourceTensor | None = None
        self._whole: torch.Tensor | None = None

    def read(self, source: SourceTensor) -> torch.Tensor:
        """Its value, in memory that holds on to no more than that."""
        cut = source.read
        if not isinstance(cut, Cut):
            self.forget()
            self._first(source)
            return source.read()
        if self._whole is None or self._source is not cut.source:
            self.forget()  # before there is another
            self._first(source)
            self._source, self._whole = cut.source, cut.whole()
        return cut.of(self._whole).clone()

    def forget(self) -> None:
        """Let go of what is held."""
        self._source = self._whole = None
