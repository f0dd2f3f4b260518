"""Runs jobs: gives them their turn and their GPUs, and finds those of an earlier service again.

The table in `states` says what may happen; the store has what did. A job's processes never need this one: it reads what
they wrote, and asks the kernel whether they live.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import structlog

from tandem.errors import NotFound, Reason, TandemError, invalid
from tandem.rpc.address import MAX_UNIX_PATH_BYTES
from trainer_service.jobs import gpus
from trainer_service.jobs.attempts import Attempts, Limits
from trainer_service.jobs.checker import Checker
from trainer_service.jobs.feed import Feed
from trainer_service.jobs.folder import SOCKET, Checkpoint, JobFolder
from trainer_service.jobs.reading import refusal
from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.states import ACTIVE, WAITING, JobState, Move
from trainer_service.jobs.store import Job, Store

log = structlog.get_logger(__name__)
T = TypeVar("T")

#: How often jobs that wait are looked at where nothing tells of a change.
_LOOK_S = 1.0
#: Why a job does not start that waited a moment ago: it was cancelled, or deleted.
_MEANWHILE = (Reason.JOB_STATE, Reason.JOB_NOT_FOUND)


class Supervisor:
    """Owns the jobs of one store. Use it from one event loop."""

    def __init__(self, store: Store, root: Path, limits: Limits) -> None:
        """Nothing runs yet.

        Args:
            store: where jobs are kept; its lock is held.
            root: the folder in which each job has one.
            limits: what jobs may have.

        Raises:
            InvalidArgument: the path of `root` leaves no room for sockets.
        """
        self._store = store
        #: The folder in which each job has one, by its id.
        self.root = root
        self._limits = limits
        self._checker = Checker()
        self.feed = Feed(store)
        self._attempts = Attempts(store, root, limits, self._changed)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        longest = len(str(root)) + len(f"/{_new_id()}/{SOCKET}")
        if longest > MAX_UNIX_PATH_BYTES:
            raise invalid(
                "folder", f"its path is {longest - MAX_UNIX_PATH_BYTES} bytes too long for sockets in it"
            )

    async def start(self) -> None:
        """Find the jobs of an earlier service, and go on with all of them."""
        self._attempts.standbys.start()
        for job in await self._find(ACTIVE | {JobState.DELETING}):
            if job.state is JobState.DELETING:
                self._keep(asyncio.create_task(self._remove(job.id)))
            else:
                log.info("found again", job=job.id, state=job.state)
                self._attempts.follow(job)
        self._keep(asyncio.create_task(self._schedule()))
        self._keep(asyncio.create_task(self._checker.start()))

    async def stop(self) -> None:
        """Leave the jobs to themselves: their processes go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._attempts.stop()
        await self._checker.stop()

    async def check(self, spec: JobSpec) -> None:
        """Return if nothing is wrong with a job. Raises InvalidArgument, naming each field at fault."""
        if violations := gpus.lacking(spec, self._limits.gpus):
            raise refusal(violations)
        await self._checker.check(spec)

    async def submit(self, spec: JobSpec, request_id: str = "") -> Job:
        """Check a job and queue it; or find the one that this request made before.

        Raises:
            InvalidArgument: names each field at fault.
            ResourceExhausted: DISK_FULL.
        """
        known = await asyncio.to_thread(self._store.requested, request_id, spec) if request_id else None
        if known is not None:
            return known
        await self.check(spec)
        job = await asyncio.to_thread(self._store.create, _new_id(), spec, request_id)
        self._changed(job.id)
        return job

    async def get(self, job_id: str) -> Job:
        """A job."""
        return await asyncio.to_thread(self._store.get, job_id)

    async def find(
        self, *, states: Collection[JobState], labels: Mapping[str, str], limit: int, before: int
    ) -> list[Job]:
        """Jobs, the newest first, as the store has them."""
        return await asyncio.to_thread(
            self._store.find, states=states, labels=labels, limit=limit, before=before
        )

    async def cancel(self, job_id: str) -> Job:
        """Have a job end. Raises FailedPrecondition where it has. Goes on if the caller does not wait."""
        return await self._through(self._cancel(job_id))

    async def _cancel(self, job_id: str) -> Job:
        job = await asyncio.to_thread(self._store.move, job_id, Move.CANCEL, "cancelled")
        self._attempts.hurry(job_id)
        if job.state is JobState.CANCELLING:
            self._attempts.cancel(job)
        self._changed(job_id)
        return job

    async def resume(self, job_id: str) -> Job:
        """Have a failed or cancelled job go on. Raises FailedPrecondition for others."""
        return await self._through(self._resume(job_id))

    async def _resume(self, job_id: str) -> Job:
        job = await asyncio.to_thread(
            self._store.move, job_id, Move.RESUME, "resumed", retries=0, end_time=None
        )
        self._attempts.hurry(job_id)
        self._changed(job_id)
        return job

    async def delete(self, job_id: str) -> None:
        """End whatever a job has and remove it. Goes on if the caller does not wait."""
        await self._through(self._delete(job_id))

    async def _delete(self, job_id: str) -> None:
        await asyncio.to_thread(self._store.move, job_id, Move.DELETE, "deleted")
        self._changed(job_id)
        await self._remove(job_id)

    async def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The job's complete checkpoints, the oldest first."""
        await self.get(job_id)
        return await asyncio.to_thread(self.folder(job_id).checkpoints)

    def folder(self, job_id: str) -> JobFolder:
        """The job's folder."""
        return JobFolder(self.root / job_id)

    async def _remove(self, job_id: str) -> None:
        while True:
            try:
                job = await self.get(job_id)
                await self._attempts.abandon(job)
                await asyncio.to_thread(self.folder(job_id).remove)
                await asyncio.to_thread(self._store.delete, job_id)
                break
            except NotFound:  # somebody else deleted it at the same time
                break
            except (TandemError, OSError) as error:
                log.warning("a job cannot be removed now", job=job_id, error=str(error))
                await asyncio.sleep(_LOOK_S)
        self._changed(job_id)

    async def _schedule(self) -> None:
        """Start jobs as there is room for them, the oldest that fits first."""
        while True:
            self._wake.clear()
            try:
                await self._start_some()
            except (TandemError, OSError) as error:
                log.warning("cannot start jobs now", error=str(error))
            except Exception as error:  # the other jobs have their turn all the same
                log.error("starting jobs failed, and goes on", exc_info=error)
            # Not wait_for: Python 3.11's loses a cancellation that comes with the change, and this would never end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()

    async def _start_some(self) -> None:
        waiting = sorted(await self._find(WAITING), key=lambda job: job.number)
        if not waiting:
            return
        running = {job.id: job for job in await self._find(ACTIVE | {JobState.DELETING})}
        taken = {gpu for job in running.values() for gpu in job.gpus}
        for job in waiting:
            if len(running) >= self._limits.max_running:
                return
            free = gpus.chosen(job.spec, self._limits.gpus, taken)
            if free is None or not self._attempts.due(job):
                continue
            try:
                await self._attempts.start(job, free)
            except TandemError as error:
                if error.reason not in _MEANWHILE:
                    raise
                continue
            running[job.id] = job
            taken |= set(free)

    async def _find(self, states: Collection[JobState]) -> list[Job]:
        return await asyncio.to_thread(self._store.find, states=states)

    def _changed(self, job_id: str) -> None:
        self.feed.notify(job_id)
        self._wake.set()

    async def _through(self, doing: Coroutine[Any, Any, T]) -> T:
        """Do it to its end, also where the caller's time is over: the store may have done its part by then."""
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the supervisor failed", exc_info=error)


def _new_id() -> str:
    return f"job-{secrets.token_hex(6)}"
