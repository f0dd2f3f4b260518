"""The service's line to the thread in the engine's worker that receives by NCCL. Knows nothing of gRPC.

vLLM's own calls to a worker come between two steps of generation. What is said here is heard at once, and the worker
says every quarter of a second that it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import structlog

from inference_service.engine import Engine
from tandem.errors import Aborted, Reason

log = structlog.get_logger(__name__)

SILENT_S = 2.0
_TICK_S = 0.25
_CONNECT_S = 20.0

Answer = asyncio.Future[dict[str, Any]]


class Link:
    """Orders to the worker, which it carries out one after the other, and their answers."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self._pending: dict[int, Answer] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._heard = 0.0
        self.joined = ""  # whose communicator the worker is in

    async def open(self) -> None:
        """Have the worker connect, if it has not.

        Raises:
            Aborted: LEASE_LOST, it did not come.
        """
        async with self._opening:
            if self._writer is None:
                await self._connect()

    def order(self, do: str, **fields: Any) -> Answer:
        """Tell the worker to do something, now. The answer may come late: wait for it with `answered`."""
        number = next(self._numbers)
        answer: Answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        if self._writer is None:
            answer.set_exception(_lost("the engine's worker is not connected"))
            return answer
        self._pending[number] = answer
        self._writer.write(json.dumps({"order": number, "do": do, **fields}).encode() + b"\n")
        return answer

    def abort(self) -> None:
        """Have the worker give up what it does, and the communicator. There is no answer."""
        self.joined = ""
        if self._writer is not None:
            self._writer.write(json.dumps({"do": "abort"}).encode() + b"\n")

    async def answered(self, answer: Answer) -> dict[str, Any]:
        """Wait for an answer as long as the worker says that it is there.

        Raises:
            Aborted: LEASE_LOST, with the worker's words, or what became of it.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not answer.done():
            before = loop.time()
            await asyncio.wait({answer}, timeout=_TICK_S)
            if loop.time() - before > 2 * _TICK_S:  # this loop was stalled itself
                since = loop.time()
            if loop.time() - max(self._heard, since) > SILENT_S:
                self._break(f"nothing was heard of the engine's worker for {SILENT_S:g} s")
        return answer.result()

    def close(self) -> None:
        """Let go of the worker, whose thread then ends."""
        self._break("the service let go of the engine's worker")

    async def _connect(self) -> None:
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if came.done():
                writer.close()
                return
            self._writer, self._heard = writer, asyncio.get_running_loop().time()
            self._reading = asyncio.ensure_future(self._read(reader, writer))
            came.set_result(None)

        folder = tempfile.mkdtemp(prefix="tandem-")
        try:
            path = str(Path(folder, "link.sock"))
            server = await asyncio.start_unix_server(connected, path)
            try:
                await self._engine.call_workers("tandem_link", path)
                await asyncio.wait_for(came, _CONNECT_S)
            finally:
                server.close()  # and no `async with`: from Python 3.12 on that waits for the line's end, too
        except TimeoutError:
            raise _lost("the engine's worker did not connect") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self._heard = asyncio.get_running_loop().time()
                said = json.loads(line)
                answer = self._pending.pop(said.get("order", 0), None)
                if answer is None or answer.done():
                    continue
                if "error" in said:
                    answer.set_exception(_lost(said["error"]))
                else:
                    answer.set_result(said)
        if self._writer is writer:
            self._break("the engine's worker is gone")

    def _break(self, reason: str) -> None:
        writer, self._writer = self._writer, None
        self.joined = ""
        pending, self._pending = self._pending, {}
        if writer is not None:
            log.info("line to the worker closed", reason=reason)
            writer.close()
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(_lost(reason))


def _seen(answer: Answer) -> None:
    """Whoever waited for it has seen what it raised, or has left."""
    if not answer.cancelled():
        answer.exception()


def _lost(reason: str) -> Aborted:
    return Aborted(Reason.LEASE_LOST, reason)
