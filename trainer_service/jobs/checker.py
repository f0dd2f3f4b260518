"""The service's side of `check`: a process that has TRL loaded, started when it is first needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

import structlog

from tandem.errors import Internal, Reason, Unavailable, Violation
from trainer_service.jobs.reading import refusal
from trainer_service.jobs.spec import JobSpec

log = structlog.get_logger(__name__)

#: A check may ask the Hugging Face hub.
_TIMEOUT_S = 120.0
_FAILED = "the check of the job failed; the service's log has why"
_LATE = (
    "the check of the job took too long, as where the Hugging Face hub does not answer: nothing was submitted"
)


class Checker:
    """Checks jobs, one after the other. Use it from the event loop."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._ending: set[asyncio.Task[int]] = set()

    async def start(self) -> None:
        """Have the process load what it needs, so that nobody waits for that."""
        async with self._turn:
            await self._started()

    async def check(self, spec: JobSpec) -> None:
        """Return if nothing is wrong with a job.

        Raises:
            InvalidArgument: names each field at fault.
            Internal: the check itself failed; its process has written why.
            Unavailable: UNREACHABLE, it took too long.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    try:
                        found = await self._ask(spec)
                    except ConnectionError:  # it had been killed, as for its memory
                        self._kill()
                        found = await self._ask(spec)
            except BaseException as error:
                self._kill()  # or its answer would be the next one's
                if isinstance(error, TimeoutError):
                    raise Unavailable(Reason.UNREACHABLE, _LATE) from error
                if isinstance(error, ConnectionError):
                    raise Internal(Reason.BUG, _FAILED) from error
                raise
        if found:
            raise refusal([Violation(one["field"], one["description"]) for one in found])

    async def stop(self) -> None:
        """End the process."""
        self._kill()
        await asyncio.gather(*self._ending)

    async def _ask(self, spec: JobSpec) -> list[dict[str, str]]:
        process = await self._started()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("the process has pipes")
        process.stdin.write(spec.model_dump_json(exclude_none=True).encode() + b"\n")
        await process.stdin.drain()
        if not (line := await process.stdout.readline()):
            raise ConnectionResetError("the process that checks jobs has ended")
        answer = json.loads(line)
        if answer is None:
            raise Internal(Reason.BUG, _FAILED)
        found: list[dict[str, str]] = answer
        return found

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            # No GPU: a check must leave nothing on one.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "trainer_service.jobs.check"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 24,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:  # else its id may be another's by now
            # Its fork too, where a user's module does not end.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self._ending.add(ending := asyncio.create_task(process.wait()))
            ending.add_done_callback(self._ending.discard)
