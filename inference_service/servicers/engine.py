"""EngineService."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from inference_service.host import Host, ServingState
from inference_service.pausing import PauseMode
from tandem.engine.v1 import engine_pb2 as pb
from tandem.engine.v1 import engine_pb2_grpc
from tandem.errors import invalid

PAUSE_MODES: dict[int, PauseMode] = {
    pb.PAUSE_MODE_UNSPECIFIED: "keep",
    pb.PAUSE_MODE_KEEP: "keep",
    pb.PAUSE_MODE_WAIT: "wait",
    pb.PAUSE_MODE_ABORT: "abort",
}
#: The contract's states by the host's.
SERVING_STATES: dict[ServingState, Any] = {
    state: pb.ServingState.Value(f"SERVING_STATE_{state}") for state in ServingState
}


def pause_mode(value: int, field: str) -> PauseMode:
    """The engine's pause mode for a PauseMode of the contract."""
    if value not in PAUSE_MODES:
        raise invalid(field, f"no PauseMode {value}")
    return PAUSE_MODES[value]


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Steers a Host's engine. `lag` tells the event loop's largest recent lateness in seconds."""

    def __init__(self, host: Host, lag: Callable[[], float]) -> None:
        self._host = host
        self._lag = lag

    async def Pause(self, request: pb.PauseRequest, context: Any) -> pb.PauseResponse:
        clear = request.clear_cache if request.HasField("clear_cache") else True
        await self._host.policy.engine.pause("client", pause_mode(request.mode, "mode"), clear)
        return pb.PauseResponse()

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.ResumeResponse:
        await self._host.policy.engine.resume("client")
        return pb.ResumeResponse()

    async def Sleep(self, request: pb.SleepRequest, context: Any) -> pb.SleepResponse:
        released = await self._host.policy.engine.sleep(self._host.changed)
        return pb.SleepResponse(released_bytes=released)

    async def WakeUp(self, request: pb.WakeUpRequest, context: Any) -> pb.WakeUpResponse:
        await self._host.policy.engine.wake_up(self._host.changed)
        return pb.WakeUpResponse()

    async def ResetPrefixCache(
        self, request: pb.ResetPrefixCacheRequest, context: Any
    ) -> pb.ResetPrefixCacheResponse:
        return pb.ResetPrefixCacheResponse(reset=await self._host.policy.engine.reset_prefix_cache())

    async def LoadLora(self, request: pb.LoadLoraRequest, context: Any) -> pb.LoadLoraResponse:
        for name in ("name", "path"):
            if not getattr(request, name):
                raise invalid(name, "is required")
        policy = self._host.policy
        shapes = {spec.name: spec.shape for spec in policy.manifest}
        await policy.engine.load_lora(request.name, request.path, shapes)
        return pb.LoadLoraResponse()

    async def UnloadLora(self, request: pb.UnloadLoraRequest, context: Any) -> pb.UnloadLoraResponse:
        if not request.name:
            raise invalid("name", "is required")
        await self._host.policy.engine.unload_lora(request.name)
        return pb.UnloadLoraResponse()

    async def GetStats(self, request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:
        state, reason = self._host.state()
        response = pb.GetStatsResponse(state=SERVING_STATES[state], reason=reason)
        if (policy := self._host.loaded) is not None:
            counters = pb.GetStatsResponse(
                **vars(policy.engine.stats),
                weight_version=policy.version,
                updates_committed=policy.committed,
                updates_failed=policy.failed,
                loras=policy.engine.loras.names,
            )
            if not policy.engine.dead:
                counters.num_running, counters.num_waiting = policy.engine.load()
            counters.last_update_stopped.FromTimedelta(timedelta(seconds=policy.last_stopped))
            response.MergeFrom(counters)
        response.event_loop_lag.FromTimedelta(timedelta(seconds=self._lag()))
        return response
