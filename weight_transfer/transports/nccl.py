"""NCCL: the trainer's GPU sends, the engine's receives into its live weights or beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weight_transfer import digest as digests
from weight_transfer.cuda import nccl
from weight_transfer.cuda.devices import require_kernels
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement, check
from weight_transfer.transports.base import (
    Handshake,
    Moved,
    Piece,
    SourceTensor,
    TransportError,
    WeightTransport,
)
from weight_transfer.transports.outgoing import Buckets, Mirror, Outgoing
from weight_transfer.windows import windows

TRAINER, ENGINE, RANKS = 0, 1, 2


class NcclTransport(WeightTransport):
    """Keeps a communicator over the updates of a session, and joins a new one after each that failed."""

    name = "nccl"

    def __init__(
        self,
        manifest: Manifest,
        placements: Sequence[Placement],
        arena_sizes: Sequence[int],
        window_bytes: int,
        device: torch.device,
    ) -> None:
        """Prepare; nothing is allocated before the first `move`.

        Args:
            placements: where the engine has each tensor, in any order.
            arena_sizes: bytes of the engine's arenas.
            window_bytes: how the engine cuts them.
            device: the trainer's GPU.

        Raises:
            ValueError: a tensor cannot travel so.
        """
        where = {placement.spec.name: placement for placement in placements}
        self._manifest = manifest
        self._placements = [where[spec.name] for spec in manifest]
        self._windows = windows(self._placements, window_bytes)
        self._sizes = list(arena_sizes)
        self._device = device
        self._outgoing: Outgoing | None = None
        self._communicator: nccl.Communicator | None = None
        self._id = b""
        self._unsettled = False  # an update began, and was not committed
        self._alive: Callable[[], None] = lambda: None

    @classmethod
    def connect(cls, handshake: Handshake) -> NcclTransport:
        """What the service said, checked. Errors are those of `open_transport`."""
        device = torch.device(handshake.device)
        if device.type == "cuda":
            require_kernels()
        check(handshake.placements, handshake.arena_sizes)
        return cls(
            handshake.manifest,
            handshake.placements,
            handshake.arena_sizes,
            handshake.window_bytes,
            device,
        )

    def stands(self) -> bool:
        return self._outgoing is not None and self._outgoing.stands()

    def invitation(self) -> bytes:
        if self._communicator is None:
            try:
                self._id = nccl.unique_id()
            except nccl.NcclError as error:
                raise TransportError(f"NCCL: {error}") from error
            return self._id
        return b""

    def join(self, alive: Callable[[], None]) -> None:
        self._alive, self._unsettled = alive, True
        if self._communicator is not None:
            return
        try:
            self._communicator = nccl.Communicator(self._id, TRAINER, RANKS, self._device, alive)
        except nccl.NcclError as error:
            raise TransportError(f"NCCL: {error}") from error

    def mark(self) -> None:
        self._unsettled = False

    def forget(self) -> None:
        if self._unsettled:
            self._leave()

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        self.touched = False
        communicator = self._communicator
        if communicator is None:
            raise TransportError("NCCL: there is no communicator")
        by_index = {self._manifest.positions[source.name]: source for source in policy}
        outgoing = self._outgoing or self._chosen(policy)
        self._outgoing = outgoing
        self.touched = True
        try:
            parts = outgoing.send(by_index, communicator, self._alive)
        except nccl.NcclError as error:
            self._leave()
            raise TransportError(f"NCCL: {error}") from error
        return Moved(sum(window.nbytes for window in self._windows), digests.combine(parts))

    def close(self) -> None:
        self._leave()
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            outgoing.close()

    def _chosen(self, policy: Sequence[SourceTensor]) -> Outgoing:
        """A mirror costs nothing where parameters become it, and their size in the engine's dtype where they don't."""
        dtypes = {spec.name: spec.dtype for spec in self._manifest}
        mine = sum(
            s.spec.nbytes for s in policy if s.parameter is not None and s.spec.dtype == dtypes[s.name]
        )
        kind = Mirror if 2 * mine >= self._manifest.nbytes else Buckets
        return kind(self._manifest, self._placements, self._windows, self._sizes, self._device)

    def _leave(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()
