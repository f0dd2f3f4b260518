"""Control calls to the engine's process: one at a time, and none that waits for a dead engine for ever."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from inference_service.halt import Rest
from inference_service.launch import Launched
from tandem.errors import Reason, Unavailable

log = structlog.get_logger(__name__)

WORKERS_S = 300.0
DEATH_S = 0.25  # how soon a control call notices that the engine died

T = TypeVar("T")


class Control:
    """The part of an engine that calls vLLM's process."""

    def __init__(self, launched: Launched, timeout_s: float) -> None:
        """Of an engine which is taken for dead where it answers no control call for `timeout_s` seconds."""
        super().__init__()
        self.llm = launched.llm
        self.stats = launched.stats
        self._timeout_s = timeout_s
        self._stopped = False
        self._hangs = False
        self._control = asyncio.Lock()  # one control call at a time: vLLM's are not safe against each other
        self._ending: set[asyncio.Task[Any]] = set()
        self._rest = Rest(launched.llm)

    @property
    def dead(self) -> bool:
        """Whether a process of the engine has died, or hangs."""
        return self._stopped or self._hangs or bool(self.llm.errored)

    async def _controlled(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Do `work`, which makes control calls, when no other such work is being done.

        vLLM would wait for the answer of a dead engine, or of one that hangs, for ever. One that takes more than
        `seconds`, the engine's timeout if None, is given up. If the caller is cancelled, `work` is, and may undo what
        it did before the next begins.
        """
        try:
            await self._control.acquire()
        except BaseException:
            work.close()
            raise
        try:
            if self.dead:
                work.close()
                raise dead()
            working = asyncio.ensure_future(work)
            try:
                await self._until_done(working, self._timeout_s if seconds is None else seconds)
            finally:
                if not working.done():
                    working.cancel()
                    await self._until_done(working, self._timeout_s)
            if not working.done():
                raise dead()
            try:
                return working.result()
            except Exception as error:
                if self.dead:
                    raise dead() from error
                raise
        finally:
            self._control.release()

    async def _until_done(self, working: asyncio.Future[Any], seconds: float) -> None:
        # In ticks: a loop that was stalled itself may not blame the engine for the time.
        for _ in range(math.ceil(seconds / DEATH_S)):
            if working.done() or self.dead:
                return
            await asyncio.wait({working}, timeout=DEATH_S)
        if not working.done():
            log.error("the engine hangs", seconds=seconds)
            self._hangs = True

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`. It goes on where the caller is cancelled."""
        return await asyncio.shield(self._started(work))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin `work`, for which perhaps nobody waits: where it fails, the log says so."""
        task = self._started(work)
        task.add_done_callback(self._tell_failure)
        return task

    def _started(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._ending.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._ending.discard)
        return task

    def _tell_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.dead:
            log.warning("a control call failed", error=str(error))

    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait. vLLM counts both when it has made a step, and makes none while
        it is paused: what came since then waits.
        """
        unfinished = int(self.llm.output_processor.get_num_unfinished_requests())
        running = min(self.stats.num_running, unfinished)
        return running, unfinished - running

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each worker; the answers by rank. Generation stands still meanwhile."""
        return list(await self._controlled(self._call_workers(method, *args), WORKERS_S))

    async def _call_workers(self, method: str, *args: Any) -> list[Any]:
        self._rest.stir()
        return list(await self.llm.collective_rpc(method, timeout=WORKERS_S, args=args))


def dead() -> Unavailable:
    """The error of every call to a dead engine."""
    return Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again")
