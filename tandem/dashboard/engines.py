"""The state of the engines that a job has, or of the inference service that the dashboard was given."""

from __future__ import annotations

import asyncio
from typing import Any

from tandem.client import AsyncJob, JobState
from tandem.client._aio.calls import Calls
from tandem.dashboard import shown
from tandem.engine.v1 import engine_pb2
from tandem.engine.v1.engine_pb2_grpc import EngineServiceStub
from tandem.errors import TandemError
from tandem.inference.v1 import inference_pb2
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tandem.rpc.address import parse

_MOST = 8  # replicas of one job
#: While a job is in these, its own inference service may answer, on this socket in its folder.
_ALIVE = (JobState.STARTING, JobState.RUNNING, JobState.CANCELLING)
_SOCKET = "i.sock"


class Engines:
    """Asks engines how they are. Each question opens a channel of its own, and none outlives it."""

    def __init__(self, given: str | None, token: str | None, ca_file: Any, timeout_s: float) -> None:
        """Nothing is asked yet.

        Args:
            given: the inference service's address; None is the one that a client takes by default.
            token: its token, which goes to no other address.
            ca_file: the authorities that sign its certificate.
            timeout_s: deadline in seconds of each call.
        """
        self._given, self._timeout_s = given, timeout_s
        self._options = {"token": token, "ca_file": ca_file}

    async def of_service(self) -> list[dict[str, Any]]:
        """The state of the given inference service."""
        return [await self._ask(self._given, self._options)]

    async def of_job(self, job: AsyncJob) -> list[dict[str, Any]]:
        """The state of each of a job's engines. A job's own service has one only while the job's processes run."""
        target = job.spec.inference
        if target.HasField("managed"):
            if job.state not in _ALIVE:
                return []
            return [await self._ask(f"unix://{job.folder}/{_SOCKET}", {})]
        addresses = list(target.service.addresses[:_MOST])
        return list(
            await asyncio.gather(*(self._ask(address, self._meant(address)) for address in addresses))
        )

    def _meant(self, address: str) -> dict[str, Any]:
        # A job may name any address: what is secret goes only where whoever started the dashboard sends it.
        try:
            same = parse(address) == parse(Calls(InferenceServiceStub, "inference", self._given, {}).address)
        except TandemError:
            same = False
        return self._options if same else {}

    async def _ask(self, address: str | None, options: dict[str, Any]) -> dict[str, Any]:
        inference = Calls(InferenceServiceStub, "inference", address, options)
        engine = Calls(EngineServiceStub, "inference", address, options)
        found: dict[str, Any] = {"address": address}
        try:
            found["address"] = inference.address
            model, stats = await asyncio.gather(
                inference.one("GetModel", inference_pb2.GetModelRequest(), self._timeout_s),
                engine.one("GetStats", engine_pb2.GetStatsRequest(), self._timeout_s),
            )
        except TandemError as error:
            return found | {"error": shown.error(error)}
        finally:
            await inference.close()
            await engine.close()
        return found | _facts(model, stats)


def _facts(model: inference_pb2.GetModelResponse, stats: engine_pb2.GetStatsResponse) -> dict[str, Any]:
    known = stats.state in engine_pb2.ServingState.values()
    name = engine_pb2.ServingState.Name(stats.state) if known else "UNSPECIFIED"
    return {
        "state": name.removeprefix("SERVING_STATE_"),
        "reason": stats.reason,
        "model": model.model,
        "engine_id": model.engine_id,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "vllm_version": model.vllm_version,
        "weight_version": stats.weight_version,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "kv_cache_usage": stats.kv_cache_usage,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "tokens_generated": stats.tokens_generated,
        "rollouts_finished": stats.rollouts_finished,
        "updates_committed": stats.updates_committed,
        "updates_failed": stats.updates_failed,
        "last_update_stopped_ms": stats.last_update_stopped.ToNanoseconds() / 1e6,
        "loras": list(stats.loras),
    }
