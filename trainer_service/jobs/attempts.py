"""Attempts at jobs: their processes started, followed to their end, and told to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from tandem.errors import NotFound, TandemError
from trainer_service.jobs import processes
from trainer_service.jobs.folder import FULL, JobFolder, Outcome, is_full
from trainer_service.jobs.processes import Identity
from trainer_service.jobs.standby import Standbys
from trainer_service.jobs.start import environment, reap, spawn
from trainer_service.jobs.states import ACTIVE, JobState, Move, after
from trainer_service.jobs.store import Job, Store
from trainer_service.jobs.tail import ingest
from trainer_service.jobs.warm import Given

log = structlog.get_logger(__name__)
T = TypeVar("T")

_MAX_DELAY_S = 60.0
#: Until what the store refused is tried again.
_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What jobs may have."""

    max_running: int = 1
    """Jobs that run at once."""
    gpus: tuple[str, ...] = ()
    """GPUs to give out."""
    cancel_grace_s: float = 60.0
    """Seconds from the request to end a job until its processes are killed."""
    retry_delay_s: float = 1.0
    """Seconds until a job whose process died starts again. They double with each time."""
    poll_s: float = 0.1
    """How often a job's files are looked at."""
    standby: int = 0
    """Processes that wait for jobs, with all libraries loaded."""


class Attempts:
    """The jobs that have processes. Use it from the event loop."""

    def __init__(self, store: Store, root: Path, limits: Limits, changed: Callable[[str], None]) -> None:
        self._store = store
        self._root = root
        self._limits = limits
        self._changed = changed
        self.standbys = Standbys(limits.standby, root)
        self._following: dict[str, asyncio.Task[None]] = {}
        self._cancelling: dict[str, asyncio.Task[None]] = {}
        self._due: dict[str, float] = {}
        self._starting = asyncio.Lock()

    def due(self, job: Job) -> bool:
        """Whether a job that waits may start, and is not still being followed to its last end."""
        return job.id not in self._following and time.monotonic() >= self._due.get(job.id, 0.0)

    def hurry(self, job_id: str) -> None:
        """Forget a job's pause: who resumes it waits for no earlier retry."""
        self._due.pop(job_id, None)

    async def start(self, job: Job, gpus: tuple[str, ...]) -> None:
        """Start a job's next attempt.

        Raises:
            FailedPrecondition: the job does not wait any more. NotFound: it was deleted.
        """
        async with self._starting:  # whoever deletes it waits until all that it has is known
            job = await asyncio.to_thread(self._store.get, job.id)
            after(job.id, job.state, Move.START)  # before it has a folder, which nobody would remove
            await self._start(job, gpus)

    async def _start(self, job: Job, gpus: tuple[str, ...]) -> None:
        folder = self._folder(job)
        try:
            await asyncio.to_thread(folder.make, job.spec)
        except OSError as error:
            if not is_full(error):
                raise
            await asyncio.to_thread(self._store.move, job.id, Move.FAIL, FULL)
            self._changed(job.id)
            return
        ready = None if job.spec.hardware.launched else self.standbys.take()
        # Before its process is there, or has a job: one that is not in the store is found by its mark, and ended.
        process = "" if ready is None else str(ready.identity)
        attempt = job.attempt + 1
        try:
            job = await asyncio.to_thread(
                self._store.move, job.id, Move.START, attempt=attempt, gpus=gpus, process=process
            )
        except BaseException as error:
            if ready is not None:
                ready.end()
            if isinstance(error, TandemError):
                await self._follow_unheard(job.id, attempt)
            raise
        identity = None if ready is None else ready.identity
        try:
            if ready is None or not ready.give(Given(folder.path, job.attempt, environment(folder, job))):
                identity = await asyncio.to_thread(spawn, folder, job)
        except OSError as error:
            folder.tell_outcome(job.attempt, Outcome.FAILED, f"its process cannot be started: {error}")
        finally:  # whatever happened, it is in the store as one that has processes
            self.follow(job, identity)
        warm = ready is not None and identity == ready.identity
        log.info("started", job=job.id, attempt=job.attempt, process=str(identity), gpus=gpus, warm=warm)
        self._changed(job.id)

    async def _follow_unheard(self, job_id: str, attempt: int) -> None:
        """Follow an attempt that the store has, though it did not say so: its answer may be what was lost."""
        job = await self._insist(self._store.get, job_id)
        if job.state in ACTIVE and job.attempt == attempt:
            self.follow(job)
            self._folder(job).tell_outcome(attempt, Outcome.STOPPED, "the store did not answer at its start")

    def follow(self, job: Job, identity: Identity | None = None) -> None:
        """Follow a job's processes to their end, also those that an earlier service started.

        Args:
            job: as the store has it.
            identity: of its process, if the store has none or another one.
        """
        self._following[job.id] = task = asyncio.create_task(self._follow(job, identity))
        task.add_done_callback(lambda done: self._followed(job.id, done))
        if job.state is JobState.CANCELLING:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Tell a job's processes to end, and kill them after a while."""
        if job.id not in self._cancelling:
            self._cancelling[job.id] = task = asyncio.create_task(self._cancel(job))
            task.add_done_callback(lambda done: self._cancelled(job.id, done))

    async def abandon(self, job: Job) -> None:
        """Kill a job's processes, and follow them no more. For one that is being deleted, and starts no more."""
        async with self._starting:
            self._due.pop(job.id, None)
        await _ended(self._following.pop(job.id, None))
        await _ended(self._cancelling.pop(job.id, None))
        job = await asyncio.to_thread(self._store.get, job.id)
        await self._kill(job, Identity.parse(job.process))

    async def stop(self) -> None:
        """Follow nothing any more. The processes of jobs go on."""
        tasks = [*self._following.values(), *self._cancelling.values()]
        await asyncio.gather(*(_ended(task) for task in tasks))
        await self.standbys.stop()

    async def _follow(self, job: Job, identity: Identity | None) -> None:
        """Until the job is settled. What fails on the way is tried again: nobody else would."""
        delay = _AGAIN_S
        while True:
            try:
                if identity is not None and str(identity) != job.process:
                    job = await self._insist(self._store.append, job.id, [], process=str(identity))
                await self._follow_on(job, identity or Identity.parse(job.process))
                return
            except NotFound:  # it was deleted
                return
            except Exception as error:  # whatever it is, the job is not left alone
                log.error("following a job failed, and goes on", job=job.id, exc_info=error)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _MAX_DELAY_S)

    async def _follow_on(self, job: Job, identity: Identity | None) -> None:
        descriptor = identity.open() if identity is not None else None
        gone = asyncio.Event()
        if descriptor is None:
            gone.set()
        else:
            asyncio.get_running_loop().add_reader(descriptor, gone.set)
        try:
            while not gone.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.poll_s):  # see Supervisor._schedule
                        await gone.wait()
                job = await self._ingest(job)
                if job.state is not JobState.STARTING:
                    self.standbys.refill()
        finally:
            if descriptor is not None:
                asyncio.get_running_loop().remove_reader(descriptor)
                os.close(descriptor)
        self.standbys.refill()
        await self._kill(job, identity)
        if identity is not None:  # not before: until then nobody else has its id, nor its session's
            await asyncio.to_thread(reap, identity)
        job = await self._ingest(job, rest=True)
        await self._settle(job)

    async def _ingest(self, job: Job, *, rest: bool = False) -> Job:
        """Take all that is new. Where the store refuses it, nothing is lost, and it is tried again."""
        more = True
        while more:
            job, more = await self._insist(self._take, job.id, rest)
            if more:
                self._changed(job.id)
        return job

    def _take(self, job_id: str, rest: bool) -> tuple[Job, bool]:
        job = self._store.get(job_id)  # each time: others move it, and so may a try that failed halfway
        return ingest(self._store, self._folder(job), job, rest=rest)

    async def _insist(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Have the store do something, when it can. Raises NotFound, and what is no matter of waiting."""
        while True:
            try:
                return await asyncio.to_thread(function, *args, **kwargs)
            except NotFound:
                raise
            except (TandemError, OSError) as error:
                log.warning("the store refused, and is asked again", error=str(error))
                await asyncio.sleep(_AGAIN_S)

    async def _settle(self, job: Job) -> None:
        """Say what became of a job whose processes have ended."""
        outcome, reason = await self._insist(self._folder(job).outcome, job.attempt)
        while True:
            job = await self._insist(self._store.get, job.id)
            move, changes = self._next(job, outcome)
            if job.state not in ACTIVE:  # or nothing was heard of the move that was made
                return
            try:
                await asyncio.to_thread(
                    self._store.move, job.id, move, reason, process="", gpus=(), **changes
                )
            except NotFound:
                raise
            except (TandemError, OSError) as error:  # the disk is full, or somebody cancelled it just now
                log.warning("the end of a job cannot be stored now", job=job.id, error=str(error))
                await asyncio.sleep(_AGAIN_S)
                continue
            log.info("ended", job=job.id, attempt=job.attempt, move=move, reason=reason)
            break
        if move is Move.RETRY:
            delay = self._limits.retry_delay_s * 2 ** max(0, changes.get("retries", 1) - 1)
            self._due[job.id] = time.monotonic() + min(delay, _MAX_DELAY_S)
        else:
            self._due.pop(job.id, None)

    def _next(self, job: Job, outcome: Outcome) -> tuple[Move, dict[str, Any]]:
        if outcome is Outcome.SUCCEEDED:
            return Move.SUCCEED, {}
        if job.state is JobState.CANCELLING:
            return Move.STOP, {}
        if outcome is Outcome.FAILED:
            return Move.FAIL, {}
        identity = Identity.parse(job.process)
        # Where the whole machine ended, or somebody told the process to, the job is not to blame.
        if outcome is Outcome.STOPPED or identity is None or identity.boot != processes.boot_id():
            return Move.RETRY, {}
        if job.retries >= job.spec.max_retries:
            return Move.FAIL, {}
        return Move.RETRY, {"retries": job.retries + 1}

    async def _cancel(self, job: Job) -> None:
        attempt, told = job.attempt, None
        deadline = time.monotonic() + self._limits.cancel_grace_s
        while told is None or time.monotonic() < deadline:
            job = await self._insist(self._store.get, job.id)
            if job.state is not JobState.CANCELLING or job.attempt != attempt:
                return  # what runs by now was not told to end
            # None while it is started; or it is started anew, since the one that waited for a job has ended.
            identity = Identity.parse(job.process)
            if identity is not None and identity != told:
                identity.send(signal.SIGTERM)
                told = identity
            await asyncio.sleep(self._limits.poll_s)
        log.warning("did not end in time, and is killed", job=job.id)
        told.send(signal.SIGKILL)  # what it started, whoever follows it kills

    async def _kill(self, job: Job, identity: Identity | None) -> None:
        while True:
            try:
                await asyncio.to_thread(processes.kill, self._folder(job).path, identity)
                break
            except TimeoutError as error:
                log.error("cannot end a job", job=job.id, error=str(error))
        await asyncio.to_thread(self._folder(job).drop_sockets)

    def _followed(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._following.get(job_id) is task:
            del self._following[job_id]
        if not task.cancelled() and (cancelling := self._cancelling.pop(job_id, None)) is not None:
            cancelling.cancel()
        self._changed(job_id)

    def _cancelled(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._cancelling.get(job_id) is task:
            del self._cancelling[job_id]
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, NotFound):
            log.error("ending a job failed", job=job_id, exc_info=error)

    def _folder(self, job: Job) -> JobFolder:
        return JobFolder(self._root / job.id)


async def _ended(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
