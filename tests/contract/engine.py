"""Servicers for tests: the contract's EngineService, and one of raw bytes with all four kinds of RPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from tandem.engine.v1 import engine_pb2, engine_pb2_grpc

ENGINE = "tandem.engine.v1.EngineService"
RAW = "tandem.test.v1.RawService"

Behavior = Callable[[Any, Any], Any]


class ScriptedEngine(engine_pb2_grpc.EngineServiceServicer):
    """Does what a test assigns: `pause` and `get_stats` for the contract's methods, the rest for RawService.

    WakeUp is left as the generated code has it: not implemented.
    """

    pause: Behavior
    unary_unary: Behavior
    unary_stream: Behavior
    stream_unary: Behavior
    stream_stream: Behavior
    watch: Behavior

    async def Pause(self, request: Any, context: Any) -> engine_pb2.PauseResponse:
        await self.pause(request, context)
        return engine_pb2.PauseResponse()

    async def GetStats(self, request: Any, context: Any) -> engine_pb2.GetStatsResponse:
        return await self.get_stats(request, context)

    async def get_stats(self, request: Any, context: Any) -> engine_pb2.GetStatsResponse:
        return engine_pb2.GetStatsResponse(reason="it works", weight_version=7)


def add_raw(engine: ScriptedEngine, server: Any) -> None:
    """Add RawService, whose messages are bytes."""
    handlers = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(lambda r, c: engine.unary_unary(r, c)),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(lambda r, c: engine.unary_stream(r, c)),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(lambda r, c: engine.stream_unary(r, c)),
        "StreamStream": grpc.stream_stream_rpc_method_handler(lambda r, c: engine.stream_stream(r, c)),
        "Watch": grpc.unary_stream_rpc_method_handler(lambda r, c: engine.watch(r, c)),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RAW, handlers),))


class Raw:
    """Client of RawService."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.unary_unary = channel.unary_unary(f"/{RAW}/UnaryUnary")
        self.unary_stream = channel.unary_stream(f"/{RAW}/UnaryStream")
        self.stream_unary = channel.stream_unary(f"/{RAW}/StreamUnary")
        self.stream_stream = channel.stream_stream(f"/{RAW}/StreamStream")
        self.watch = channel.unary_stream(f"/{RAW}/Watch")
