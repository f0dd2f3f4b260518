"""Processes that have all libraries loaded before there is a job for them: a job that gets one starts at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from trainer_service.jobs import processes, warm
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.start import launch, reap
from trainer_service.jobs.warm import Given

log = structlog.get_logger(__name__)

#: How long the job that got the last one has the machine for itself, before the next one loads.
_REST_S = 15.0
#: Until one that ended by itself has a successor. Doubles with each that does not last.
_AGAIN_S = 1.0
_MAX_AGAIN_S = 60.0
_LOOK_S = 1.0


@dataclass(slots=True)
class Waiting:
    """One that waits for a job: the leader of a session, and in it the process that will train."""

    identity: Identity
    pipe: int
    mark: Path

    def give(self, job: Given) -> bool:
        """Make it the job's. False if it has ended by now."""
        line = job.line()
        try:
            return os.write(self.pipe, line) == len(line)  # less than a pipe holds: it never blocks
        except BrokenPipeError:
            return False
        finally:
            os.close(self.pipe)

    def end(self) -> None:
        """Leave nothing of it. Blocks."""
        os.close(self.pipe)
        processes.kill(self.mark, self.identity)
        reap(self.identity)


class Standbys:
    """Keeps so many ready. Use it from the event loop.

    Each ends itself where this process does, however that comes: its input ends then. One that has a job does not.
    """

    def __init__(self, count: int, root: Path) -> None:
        """Nothing runs yet. `root` is the folder in which each job has one."""
        self._count = count
        self._root = root
        self._ready: list[Waiting] = []
        self._wake = asyncio.Event()
        self._rest = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to keep them."""
        if self._count:
            self._task = asyncio.create_task(self._keep())

    def take(self) -> Waiting | None:
        """One for a job, if one is there; whoever gets it gives it one, or ends it."""
        while self._ready:
            one = self._ready.pop(0)
            if one.identity.alive:
                self._rest = time.monotonic() + _REST_S
                return one
            one.end()
        return None

    def refill(self) -> None:
        """The job that got one has begun, or ended: the next may load."""
        if self._rest:
            self._rest = 0.0
            self._wake.set()

    async def stop(self) -> None:
        """End all that wait."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._ready:
            await asyncio.to_thread(self._ready.pop().end)

    async def _keep(self) -> None:
        again, due, begun = _AGAIN_S, 0.0, time.monotonic()
        while True:
            self._wake.clear()
            gone = [one for one in self._ready if not one.identity.alive]
            self._ready = [one for one in self._ready if one not in gone]
            for one in gone:
                log.warning("a standby process ended by itself", process=one.identity.pid)
                with contextlib.suppress(TimeoutError):  # what it left does not end, and is nobody's
                    await asyncio.to_thread(one.end)
            if gone:
                due, again = time.monotonic() + again, min(2 * again, _MAX_AGAIN_S)
            elif time.monotonic() - begun > _MAX_AGAIN_S:  # the last one lasts
                again = _AGAIN_S
            if len(self._ready) < self._count and time.monotonic() >= max(self._rest, due):
                try:
                    self._ready.append(_start(self._root))  # no thread: one that is cancelled would leave it
                    begun = time.monotonic()
                except OSError as error:
                    log.warning("cannot start a standby process", error=str(error))
                    due = time.monotonic() + _MAX_AGAIN_S
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):  # see Supervisor._schedule
                    await self._wake.wait()


def _start(root: Path) -> Waiting:
    kept = warm.environment(root)
    reading, writing = os.pipe()
    try:
        identity = launch([warm.LATER], kept, reading, 2)
    except OSError:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    return Waiting(identity, writing, Path(kept[MARK]))
