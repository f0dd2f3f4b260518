"""The ways on which weights come in: one abstract class, one file each, and the factory."""

from __future__ import annotations

from inference_service.arenas import EngineArenas, HostArenas
from inference_service.engine import Engine
from inference_service.transports.base import CHECKPOINT, NCCL, SHARED, STREAM, Incoming, Way

__all__ = ["CHECKPOINT", "NCCL", "SHARED", "STREAM", "Incoming", "Way", "incoming", "why_not_in_place"]


def incoming(way: Way, arenas: EngineArenas, engine: Engine) -> Incoming:
    """The engine's end of one update's way."""
    match way:
        case Way(transport="checkpoint"):
            from inference_service.transports.checkpoint import FromCheckpoint

            return FromCheckpoint(engine)
        case Way(invitation=invitation, in_place=in_place) if invitation is not None:
            from inference_service.transports.nccl import OverNccl

            return OverNccl(invitation, in_place=in_place, partial=way.partial)
        case Way(adapter=adapter) if adapter is not None:
            from inference_service.transports.adapter import AdapterStream

            return AdapterStream(adapter)
        case Way(transport="shared", stage=None):
            from inference_service.transports.shared import SharedInPlace

            return SharedInPlace(arenas)
        case Way(transport="shared", stage=stage) if stage is not None:
            from inference_service.transports.shared import SharedStaged

            return SharedStaged(arenas, stage)
        case Way(transport="stream", in_place=True) if isinstance(arenas, HostArenas):
            from inference_service.transports.stream import StreamInPlace

            return StreamInPlace(arenas, partial=way.partial)
        case Way(transport="stream", partial=True) if isinstance(arenas, HostArenas):
            from inference_service.transports.sparse import SparseStaged

            return SparseStaged(arenas)
        case Way(transport="stream", in_place=False, partial=False):
            from inference_service.transports.stream import StreamStaged

            return StreamStaged(arenas)
    raise ValueError(f"no update's bytes come like this: {way}")


def why_not_in_place(arenas: EngineArenas, transport: str, *, adapter: bool) -> str:
    """Why an update by that transport cannot go straight into the live weights; "" if it can."""
    if transport == STREAM and adapter:
        return "an adapter is no part of the engine's weights"
    if transport == STREAM and not isinstance(arenas, HostArenas):
        return "what is streamed to weights on a GPU waits in the host's memory"
    return ""
