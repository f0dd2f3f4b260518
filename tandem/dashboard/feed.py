"""Jobs' events for browsers: one watch of the service for each job, however many pages show it.

A page that comes late, or is slow, gets the job's picture in place of the events that it missed: none is kept for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from tandem.client import AsyncTandemClient, Event, Metrics
from tandem.dashboard import shown
from tandem.dashboard.picture import Picture, Told
from tandem.errors import NotFound, Reason, ResourceExhausted, TandemError

#: Seconds between two questions whether a job that is over was resumed, or a service that was away is back.
_AGAIN_S = 1.0
#: Seconds after which a page hears that it is still connected, and the server whether the page is still there.
_HEARTBEAT_S = 10.0
#: The newest events, for pages that are up to date.
_RECENT = 1000
_RECENT_CHARACTERS = 1 << 20


class Feed:
    """The events of one job."""

    def __init__(self, client: AsyncTandemClient, job_id: str) -> None:
        self._client, self._id = client, job_id
        self._picture = Picture()
        self._recent: deque[Told] = deque()
        self._size = 0
        self._seen = 0  # the last event's sequence number
        self._complete = False  # whether all that happened before was read
        self._service: dict[str, Any] | None = None
        self._ended = False
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the job until it is deleted. However it ends, so do the pages' streams, which they open again."""
        try:
            while not self._ended:
                await self._follow()
                await asyncio.sleep(0 if self._ended else _AGAIN_S)
        finally:
            self.close()

    async def _follow(self) -> None:
        try:
            job = await self._client.job(self._id)
            self._complete = self._complete or self._seen >= job.last_sequence
            self._tell({"up": True})
            if self._seen < job.last_sequence or not job.state.is_over:
                async with aclosing(job.watch(self._seen)) as events:
                    async for event in events:
                        self._take(event, job.last_sequence)
        except NotFound as error:
            self._ended = True
            self._tell({"up": True, "gone": True, "error": shown.error(error)})
        except TandemError as error:
            self._tell({"up": False, "error": shown.error(error)})

    def close(self) -> None:
        """End the pages' streams."""
        self._ended = True
        self._wake()

    async def messages(self, after: int) -> AsyncGenerator[str, None]:
        """What a page is sent, as text of server-sent events.

        Args:
            after: the sequence number of the last event that it has; 0 begins with the picture.
        """
        position, fresh, service = after, after == 0, None
        while True:
            changed, said = self._changed, ""
            if self._service is not service:
                service = self._service
                said += message("service", shown.encode(service))
            if self._complete and (fresh or position != self._seen):
                said += self._since(0 if fresh else position)
                position, fresh = self._seen, False
            if said:
                yield said
            if self._ended:
                return
            if changed is self._changed:
                try:
                    async with asyncio.timeout(_HEARTBEAT_S):
                        await changed.wait()
                except TimeoutError:
                    yield ":\n\n"

    def _since(self, position: int) -> str:
        if self._recent and self._recent[0].sequence - 1 <= position <= self._seen and position:
            return "".join(
                message(told.kind, told.data, told.sequence)
                for told in self._recent
                if told.sequence > position
            )
        return message("picture", self._picture.data(), self._seen)

    def _take(self, event: Event, last: int) -> None:
        kind, body = shown.event(event)
        step = event.step if isinstance(event, Metrics) else 0
        told = Told(event.sequence, kind, shown.encode(body), step)
        self._picture.add(told)
        self._recent.append(told)
        self._size += len(told.data)
        while len(self._recent) > _RECENT or (self._size > _RECENT_CHARACTERS and len(self._recent) > 1):
            self._size -= len(self._recent.popleft().data)
        self._seen = event.sequence
        self._complete = self._complete or self._seen >= last
        if self._complete:
            self._wake()

    def _tell(self, service: dict[str, Any]) -> None:
        if service != self._service:
            self._service = service
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def message(kind: str, data: str, sequence: int | None = None) -> str:
    """One server-sent event. The data has no line's end: it is JSON.

    >>> message("log", '{"text":"a"}', 3)
    'id: 3\\nevent: log\\ndata: {"text":"a"}\\n\\n'
    """
    number = "" if sequence is None else f"id: {sequence}\n"
    return f"{number}event: {kind}\ndata: {data}\n\n"


class Feeds:
    """The feeds of the jobs that pages show. A feed stays for a while after the last page of its job was closed."""

    def __init__(self, client: AsyncTandemClient, *, most: int = 64, linger_s: float = 30.0) -> None:
        """Nothing is followed yet.

        Args:
            client: asks the trainer service.
            most: streams to pages at once.
            linger_s: seconds that a feed nobody reads stays.
        """
        self._client, self._most, self._linger_s = client, most, linger_s
        self._feeds: dict[str, tuple[Feed, asyncio.Task[None]]] = {}
        self._readers: dict[Feed, int] = {}
        self._idle: dict[Feed, asyncio.TimerHandle] = {}

    @asynccontextmanager
    async def reading(self, job_id: str) -> AsyncIterator[Feed]:
        """The feed of a job, while it is read.

        Raises:
            ResourceExhausted: QUEUE_FULL, too many pages are open.
        """
        if sum(self._readers.values()) >= self._most:
            raise ResourceExhausted(Reason.QUEUE_FULL, f"{self._most} pages follow jobs already: close some")
        feed = self._feed(job_id)
        self._readers[feed] = self._readers.get(feed, 0) + 1
        if timer := self._idle.pop(feed, None):
            timer.cancel()
        try:
            yield feed
        finally:
            self._readers[feed] -= 1
            if not self._readers[feed]:
                del self._readers[feed]
                loop = asyncio.get_running_loop()
                self._idle[feed] = loop.call_later(self._linger_s, self._drop, job_id, feed)

    async def close(self) -> None:
        """End all streams, and follow nothing any more."""
        for timer in self._idle.values():
            timer.cancel()
        tasks = [task for _, task in self._feeds.values()]
        for feed, task in self._feeds.values():
            feed.close()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._feeds.clear()

    def _feed(self, job_id: str) -> Feed:
        feed, task = self._feeds.get(job_id, (None, None))
        if feed is None or task is None or task.done():
            if feed is not None:
                self._forget(feed)
            feed = Feed(self._client, job_id)
            while len(self._feeds) >= self._most and self._idle:  # those that nobody reads go first
                oldest = next(iter(self._idle))
                self._drop(next(name for name, (other, _) in self._feeds.items() if other is oldest), oldest)
            self._feeds[job_id] = (feed, asyncio.create_task(feed.run()))
        return feed

    def _drop(self, job_id: str, feed: Feed) -> None:
        self._forget(feed)
        if job_id in self._feeds and self._feeds[job_id][0] is feed:
            self._feeds.pop(job_id)[1].cancel()

    def _forget(self, feed: Feed) -> None:
        if timer := self._idle.pop(feed, None):
            timer.cancel()
