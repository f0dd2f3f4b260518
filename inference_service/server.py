"""The inference service's life: answer health at once, load the model, serve, drain."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
from collections.abc import Callable

import structlog

from inference_service.collect import collect
from inference_service.config import InferenceSettings
from inference_service.engine import Engine
from inference_service.host import Host, ServingState
from inference_service.modes import Modes
from inference_service.policy import Policy
from inference_service.servicers.engine import EngineServicer
from inference_service.servicers.inference import InferenceServicer
from inference_service.servicers.weights import WeightServicer
from inference_service.sessions import Sessions
from tandem.engine.v1 import engine_pb2_grpc
from tandem.errors import Reason, Unavailable
from tandem.inference.v1 import inference_pb2_grpc
from tandem.rpc import Serving
from tandem.weights.v1 import weights_pb2_grpc

log = structlog.get_logger(__name__)

INFERENCE = "tandem.inference.v1.InferenceService"
ENGINE = "tandem.engine.v1.EngineService"
WEIGHTS = "tandem.weights.v1.WeightService"


async def serve(settings: InferenceSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        TandemError: a setting or an engine argument is wrong, or an address is taken.
        Unavailable: ENGINE_DEAD, the engine died, and `exit_on_engine_death` has the service end with it.
    """
    host = Host()
    serving = Serving(settings.serving_config())
    host.draining = lambda: serving.draining
    serving.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceServicer(
            host,
            settings.max_message_bytes,
            max_rollouts=settings.max_rollouts,
            allow_chat_templates=settings.allow_chat_templates,
        ),
        INFERENCE,
    )
    serving.add(
        engine_pb2_grpc.add_EngineServiceServicer_to_server,
        EngineServicer(host, lambda: serving.max_lag_s),
        ENGINE,
    )
    serving.add(
        weights_pb2_grpc.add_WeightServiceServicer_to_server,
        WeightServicer(host, settings.lease_timeout_s, settings.max_chunk_bytes, serving.ending),
        WEIGHTS,
        long_lived=["WatchWeightVersion"],
    )
    await serving.start()
    serving.status("loading the model")
    waiting = asyncio.create_task(serving.wait())
    loading = asyncio.create_task(_load(settings, host, serving))
    await asyncio.wait({waiting, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # vLLM's start cannot be interrupted: leave it behind, and end what it began.
        await waiting
        for child in multiprocessing.active_children():
            child.kill()
        return
    if loading.exception() is not None:
        serving.request_stop(now=True)
    await waiting
    watching = await loading
    if settings.exit_on_engine_death and not watching.cancelled():
        raise Unavailable(Reason.ENGINE_DEAD, "the engine died, and the service ended with it")


async def _load(settings: InferenceSettings, host: Host, serving: Serving) -> asyncio.Task[None]:
    """Load the model and serve it. Returns the task that watches the engine: done if it died, else cancelled."""
    engine = await Engine.start(
        settings.model,
        settings.engine,
        settings.engine_timeout_s,
        reference=settings.reference_model or "",
        fixed=not settings.take_updates,
    )
    try:
        arenas = await collect(engine)
        policy = Policy(engine, arenas)
        sessions = Sessions(arenas, settings.trainer_uids, Modes(arenas, settings.update_mode))
        await sessions.start()
    except Exception:
        await _stop(engine)  # nobody else knows of it yet
        raise
    host.load(policy, sessions)

    def tell() -> None:
        state, reason = host.state()
        dead = state in (ServingState.DEAD, ServingState.DRAINING)
        serving.set_serving(INFERENCE, state in (ServingState.SERVING, ServingState.PAUSED))
        serving.set_serving(ENGINE, not dead)
        serving.set_serving(WEIGHTS, not dead)
        serving.set_serving("", state is not ServingState.DEAD)
        serving.status(
            f"{state.lower()} {engine.info.model}, weight version {policy.version} {reason}".strip()
        )

    async def stop() -> None:
        watching.cancel()
        try:
            await sessions.stop()
            arenas.close()
        finally:
            await _stop(engine)

    watching = asyncio.create_task(_watch(engine, tell))
    serving.on_stop(stop)
    if settings.exit_on_engine_death:
        watching.add_done_callback(lambda _: serving.request_stop())
    policy.changed.append(tell)
    host.changed = tell
    # What is there now stays. Collections that looked through all of it would stop the loop for half a second.
    gc.collect()
    gc.freeze()
    tell()
    log.info("ready", model=engine.info.model, tensors=len(policy.manifest), bytes=policy.manifest.nbytes)
    return watching


async def _stop(engine: Engine) -> None:
    engine.stop_listening()
    await asyncio.to_thread(engine.stop)


async def _watch(engine: Engine, tell: Callable[[], None]) -> None:
    """Say so within half a second when the engine dies."""
    while not engine.dead:  # noqa: ASYNC110  # vLLM tells nobody
        await asyncio.sleep(0.5)
    log.error("the engine died", model=engine.info.model)
    tell()
