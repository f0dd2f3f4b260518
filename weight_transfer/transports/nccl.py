"""NCCL: the trainer's GPU sends, the engine's receives into its live weights or beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weight_transfer import digest as digests
from weight_transfer.cuda import nccl
from weight_transfer.cuda.devices import require_kernels
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement, check
from weight_transfer.tiles import BREAK_EVEN, STAGED_BREAK_EVEN
from weight_transfer.transports.base import (
    Handshake,
    Moved,
    Piece,
    SourceTensor,
    Sum,
    TransportError,
    WeightTransport,
)
from weight_transfer.transports.nccl_sparse import SparseMirror
from weight_transfer.transports.outgoing import Buckets, Layout, Mirror, Outgoing, mirrored
from weight_transfer.windows import windows

TRAINER = 0
"""The trainer's rank. Those of the engine's workers come behind it."""


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
        ranks: int = 2,
        *,
        sparse: bool = False,
        staged: bool = False,
    ) -> None:
        """Prepare; nothing is allocated before the first `move`.

        Args:
            placements: where the engine has each tensor, in any order.
            arena_sizes: bytes of the engine's arenas.
            window_bytes: how the engine cuts them.
            device: the trainer's GPU.
            ranks: of the communicator: this one, and those of the engine's workers.
            sparse: whether updates shall carry what changed alone, where a mirror stands. That takes a second one.
            staged: whether the engine keeps them beside its weights until the commit.

        Raises:
            ValueError: a tensor cannot travel so.
        """
        where = {placement.spec.name: placement for placement in placements}
        self._manifest = manifest
        placed = tuple(where[spec.name] for spec in manifest)
        cut = tuple(windows(placed, window_bytes))
        self.layout = Layout(manifest, placed, tuple(arena_sizes), cut, device)
        self._ranks, self._sparse = ranks, sparse
        self._break_even = STAGED_BREAK_EVEN if staged else BREAK_EVEN
        self._outgoing: Outgoing | None = None
        self._communicator: nccl.Communicator | None = None
        self._id = b""
        self._connected = False  # something has travelled: what is sent now waits for nobody here
        self._ahead = False  # what was sent was not asked for yet
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
            handshake.ranks,
            sparse=handshake.partial,
            staged=handshake.staged,
        )

    @property
    def communicator(self) -> nccl.Communicator:
        """With the engine, after `join`. Raises TransportError where it was given up."""
        if self._communicator is None:
            raise TransportError("NCCL: there is no communicator")
        return self._communicator

    @property
    def partial(self) -> bool:
        return self._outgoing is not None and self._outgoing.partial

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
            self._communicator = nccl.Communicator(self._id, TRAINER, self._ranks, self.layout.device, alive)
        except nccl.NcclError as error:
            raise TransportError(f"NCCL: {error}") from error

    def ahead(self) -> None:
        # The first call makes connections, and waits for the other side: that may still let rollouts run.
        if self._communicator is None or self._outgoing is None or not self._connected:
            return
        self._ahead = True
        try:
            self._outgoing.start(self._communicator, self._alive)
        except nccl.NcclError as error:
            self.leave()
            raise TransportError(f"NCCL: {error}") from error

    def withdraw(self) -> None:
        if self._ahead:  # it would wait on this GPU for ever
            self.leave()

    def mark(self) -> None:
        self._unsettled = False
        if self._outgoing is not None:
            self._outgoing.mark()

    def forget(self) -> None:
        if self._unsettled:
            self.leave()
        elif self._outgoing is not None:
            self._outgoing.forget()

    def leave(self) -> None:
        communicator, self._communicator = self._communicator, None
        self._connected = self._ahead = False
        if self._outgoing is not None:
            self._outgoing.forget()
        if communicator is not None:
            communicator.abort()

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        self.touched, self._ahead = self._ahead, False
        communicator = self.communicator
        by_index = {self._manifest.positions[source.name]: source for source in policy}
        outgoing = self._outgoing or self._chosen(policy)
        self._outgoing = outgoing
        self.touched = True
        try:
            parts = outgoing.send(
                by_index, communicator, self._alive, lambda parts: send(Sum(digests.combine(parts)))
            )
        except nccl.NcclError as error:
            self.leave()
            raise TransportError(f"NCCL: {error}") from error
        except BaseException:  # what is on its way would wait on this GPU for ever
            self.leave()
            raise
        self._connected = True
        return Moved(outgoing.nbytes, digests.combine(parts), outgoing.changed)

    def close(self) -> None:
        self.leave()
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None:
            outgoing.close()

    def _chosen(self, policy: Sequence[SourceTensor]) -> Outgoing:
        if not mirrored(self._manifest, policy):
            return Buckets(self.layout)
        return SparseMirror(self.layout, self._break_even) if self._sparse else Mirror(self.layout)
