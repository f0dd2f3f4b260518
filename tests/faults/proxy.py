"""A wire between a trainer and a service that can be cut, slow, or dead without anybody being told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any


class Proxy:
    """Passes on what comes to the Unix socket `front` to the one at `back`, in a thread of its own."""

    def __init__(self, front: str, back: str, delay_s: float = 0.0) -> None:
        self._front, self._back, self._delay = front, back, delay_s
        self._passing = asyncio.Event()
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: asyncio.Server = self._do(asyncio.start_unix_server(self._connect, front))
        self._loop.call_soon_threadsafe(self._passing.set)

    @property
    def address(self) -> str:
        return f"unix://{self._front}"

    def cut(self) -> None:
        """Close every connection. New ones are taken."""
        self._do(self._cut())

    def swallow(self) -> None:
        """From now on nothing arrives, either way; connections stay open."""
        self._do(self._swallow())

    def carry_on(self) -> None:
        """What was swallowed arrives, and what comes."""
        self._loop.call_soon_threadsafe(self._passing.set)

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(self._back)
        self._connections |= {writer, there[1]}
        await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await asyncio.sleep(self._delay)
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
        self._connections.discard(sink)

    async def _cut(self) -> None:
        for writer in list(self._connections):
            writer.transport.abort()

    async def _swallow(self) -> None:
        self._passing.clear()

    async def _end(self) -> None:
        self._server.close()
        await self._cut()
        self._passing.set()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)  # each sees that its connections have ended
