"""The ways in which weights move: one abstract class, one file each, and the factory."""

from __future__ import annotations

from weight_transfer.transports.base import (
    Chunk,
    Handshake,
    Moved,
    Piece,
    SourceTensor,
    Sum,
    TransportError,
    WeightTransport,
)

__all__ = [
    "Chunk",
    "Handshake",
    "Moved",
    "Piece",
    "SourceTensor",
    "Sum",
    "TransportError",
    "WeightTransport",
    "open_transport",
]


def open_transport(handshake: Handshake, timeout_s: float = 10.0) -> WeightTransport:
    """The transport that the service chose.

    Raises:
        ValueError: a transport that this side does not know, or placements that leave their arena.
        OSError: the engine's memory could not be had within `timeout_s` seconds.
    """
    match handshake.transport:
        case "shared" if handshake.staged:
            from weight_transfer.transports.staged import StagedTransport

            return StagedTransport.connect(handshake, timeout_s)
        case "shared":
            from weight_transfer.transports.shared import SharedTransport

            return SharedTransport.connect(handshake, timeout_s)
        case "nccl":
            from weight_transfer.transports.nccl import NcclTransport

            return NcclTransport.connect(handshake)
        case "stream" if handshake.partial:
            from weight_transfer.transports.sparse import SparseTransport

            return SparseTransport(handshake.manifest, handshake.max_chunk_bytes)
        case "stream":
            from weight_transfer.transports.stream import StreamTransport

            return StreamTransport(handshake.manifest, handshake.max_chunk_bytes)
        case other:
            raise ValueError(f"no transport is named {other!r}: there are shared, nccl and stream")
