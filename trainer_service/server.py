"""The trainer service's life: take the store, find its jobs again, serve, drain. Jobs go on without it."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from tandem.rpc import Serving
from tandem.trainer.v1 import trainer_pb2_grpc
from trainer_service.config import TrainerSettings
from trainer_service.jobs import gpus
from trainer_service.jobs.attempts import Limits
from trainer_service.jobs.folder import make_private
from trainer_service.jobs.lock import FileLock
from trainer_service.jobs.store import open_store
from trainer_service.jobs.supervisor import Supervisor
from trainer_service.metrics import JobMetrics
from trainer_service.servicer import TrainingJobServicer

log = structlog.get_logger(__name__)

JOBS = "tandem.trainer.v1.TrainingJobService"


async def serve(settings: TrainerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        TandemError: a setting is wrong, an address is taken, or another service has the store or the folder.
    """
    folder = make_private(settings.folder)
    with contextlib.ExitStack() as stack:
        store = open_store(settings.store, folder)
        # Two services with stores of their own must not share the folder either.
        stack.callback(FileLock(folder / "service.lock").close)
        stack.callback(store.close)
        store.lock()
        there = await asyncio.to_thread(gpus.found) if settings.gpus is None else settings.gpus
        limits = Limits(
            max_running=settings.max_running or max(1, len(there)),
            gpus=tuple(there),
            cancel_grace_s=settings.cancel_grace_s,
            retry_delay_s=settings.retry_delay_s,
            standby=settings.standby,
        )
        supervisor = Supervisor(store, folder / "jobs", limits)
        servicer = TrainingJobServicer(supervisor)
        serving = Serving(settings.serving_config())
        serving.add(
            trainer_pb2_grpc.add_TrainingJobServiceServicer_to_server,
            servicer,
            JOBS,
            long_lived=["WatchJob"],
        )
        stack.callback(JobMetrics(store).close)
        await serving.start()
        serving.on_stop(supervisor.stop)
        try:
            await supervisor.start()
            await servicer.read()
        except BaseException:
            serving.request_stop(now=True)
            await serving.wait()
            raise
        serving.set_serving(JOBS, True)
        log.info("ready", folder=str(folder), max_running=limits.max_running, gpus=limits.gpus)
        await serving.wait()
