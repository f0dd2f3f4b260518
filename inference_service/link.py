"""The service's line to the threads in the engine's workers that receive by NCCL. Knows nothing of gRPC.

vLLM's own calls to a worker come between two steps of generation. What is said here is heard at once, and each worker
says every quarter of a second that it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import structlog

from inference_service.engine import Engine
from inference_service.folders import Folder
from tandem.errors import Aborted, DataLoss, Reason
from weight_transfer.manifest import Manifest

log = structlog.get_logger(__name__)

SILENT_S = 2.0
_TICK_S = 0.25
_CONNECT_S = 20.0

Answer = asyncio.Future[dict[str, Any]]


@dataclass(eq=False)
class _Line:
    """To one worker."""

    writer: asyncio.StreamWriter
    heard: float
    reading: asyncio.Task[None] | None = None


@dataclass
class _Asked:
    """An order, and which lines have not answered it."""

    answer: Answer
    owed: set[_Line] = field(default_factory=set)
    said: dict[str, Any] | None = None


class Link:
    """Orders to all workers, which they carry out one after the other, and their answers."""

    def __init__(self, engine: Engine, workers: int = 1, manifest: Manifest | None = None) -> None:
        """To an engine of so many workers. What comes is of `manifest`, of which several workers have parts."""
        self._engine = engine
        self._workers = workers
        self._manifest = manifest
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._lines: list[_Line] = []
        self._opening = asyncio.Lock()
        self.joined = ""  # whose communicator the workers are in

    async def open(self) -> None:
        """Have the workers connect, if they have not.

        Raises:
            Aborted: LEASE_LOST, they did not come.
        """
        async with self._opening:
            if not self._lines:
                await self._connect()

    def order(self, do: str, **fields: Any) -> Answer:
        """Tell the workers to do something, now. The answer may come late: wait for it with `answered`."""
        number = next(self._numbers)
        answer: Answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        if not self._lines:
            answer.set_exception(_lost("the engine's worker is not connected"))
            return answer
        self._asked[number] = _Asked(answer, set(self._lines))
        self._say({"order": number, "do": do, **fields})
        return answer

    def abort(self) -> None:
        """Have the workers give up what they do, and the communicator. There is no answer."""
        self.joined = ""
        self._say({"do": "abort"})
        # Whoever has not answered those yet will not, or says what nobody waits for.
        self._asked = {n: asked for n, asked in self._asked.items() if not asked.answer.done()}

    def drop(self) -> None:
        """Tell the workers that what they hold beside the weights will not be installed. There is no answer."""
        self._say({"do": "drop"})

    async def answered(self, answer: Answer) -> dict[str, Any]:
        """Wait for an answer as long as the workers say that they are there.

        Returns:
            What they all said.

        Raises:
            Aborted: LEASE_LOST, with a worker's words, or what became of it.
            DataLoss: DIGEST_MISMATCH, they said different things.
        """
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not answer.done():
            before = loop.time()
            await asyncio.wait({answer}, timeout=_TICK_S)
            if loop.time() - before > 2 * _TICK_S:  # this loop was stalled itself
                since = loop.time()
            heard = min((line.heard for line in self._owing(answer)), default=since)
            if not answer.done() and loop.time() - max(heard, since) > SILENT_S:
                self._break(f"nothing was heard of the engine's worker for {SILENT_S:g} s")
        return answer.result()

    def close(self) -> None:
        """Let go of the workers, whose threads then end."""
        self._break("the service let go of the engine's worker")

    def _owing(self, answer: Answer) -> set[_Line]:
        return next((asked.owed for asked in self._asked.values() if asked.answer is answer), set())

    def _say(self, what: dict[str, Any]) -> None:
        said = json.dumps(what).encode() + b"\n"
        for line in self._lines:
            line.writer.write(said)

    async def _connect(self) -> None:
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lines: list[_Line] = []

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if came.done():
                writer.close()
                return
            line = _Line(writer, asyncio.get_running_loop().time())
            line.reading = asyncio.ensure_future(self._read(reader, line))
            lines.append(line)
            if len(lines) == self._workers:
                self._lines = lines
                came.set_result(None)

        folder = Folder("link")
        try:
            path = str(folder.path / "link.sock")
            server = await asyncio.start_unix_server(connected, path)
            try:
                await self._engine.call_workers("tandem_link", path, *self._crew())
                await asyncio.wait_for(came, _CONNECT_S)
            finally:
                server.close()  # and no `async with`: from Python 3.12 on that waits for the line's end, too
        except BaseException as error:
            came.cancel()
            _let_go(lines)
            if isinstance(error, TimeoutError):
                raise _lost("the engine's worker did not connect") from None
            raise
        finally:
            folder.remove()

    def _crew(self) -> tuple[Any, ...]:
        if self._workers == 1 or self._manifest is None:
            return ()
        return self._workers + 1, [(t.name, t.dtype, list(t.shape)) for t in self._manifest]

    async def _read(self, reader: asyncio.StreamReader, line: _Line) -> None:
        with contextlib.suppress(OSError):
            while text := await reader.readline():
                line.heard = asyncio.get_running_loop().time()
                said = json.loads(text)
                asked = self._asked.get(said.get("order", 0))
                if asked is not None:
                    self._note(asked, line, said)
        if line in self._lines:
            self._break("the engine's worker is gone")

    def _note(self, asked: _Asked, line: _Line, said: dict[str, Any]) -> None:
        asked.owed.discard(line)
        if not asked.owed:
            self._asked.pop(said["order"], None)
        if asked.answer.done():
            return
        if "error" in said:
            asked.answer.set_exception(_lost(said["error"]))
        elif asked.said not in (None, said):
            what = f"the engine's workers do not agree: {asked.said}, {said}"
            asked.answer.set_exception(DataLoss(Reason.DIGEST_MISMATCH, what))
        elif not asked.owed:
            asked.answer.set_result(said)
        else:
            asked.said = said

    def _break(self, reason: str) -> None:
        lines, self._lines = self._lines, []
        self.joined = ""
        pending, self._asked = self._asked, {}
        if lines:
            log.info("line to the worker closed", reason=reason)
        _let_go(lines)
        for asked in pending.values():
            if not asked.answer.done():
                asked.answer.set_exception(_lost(reason))


def _let_go(lines: list[_Line]) -> None:
    for line in lines:
        line.writer.close()
        if line.reading is not None and line.reading is not asyncio.current_task():
            line.reading.cancel()


def _seen(answer: Answer) -> None:
    """Whoever waited for it has seen what it raised, or has left."""
    if not answer.cancelled():
        answer.exception()


def _lost(reason: str) -> Aborted:
    return Aborted(Reason.LEASE_LOST, reason)
