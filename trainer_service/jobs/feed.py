"""Events to those who watch, however many: what all of them want next is read from the store once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from tandem.errors import NotFound
from trainer_service.jobs.states import TERMINAL
from trainer_service.jobs.store import Event, EventKind, Store


class Feed:
    """Wakes watchers. Use it from the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed: dict[str, asyncio.Event] = {}
        self._reads: dict[tuple[str, int], asyncio.Task[list[Event]]] = {}

    def notify(self, job_id: str) -> None:
        """Something of the job is new."""
        if (changed := self._changed.pop(job_id, None)) is not None:
            changed.set()

    async def watch(
        self, job_id: str, after: int = 0, kinds: Collection[EventKind] = ()
    ) -> AsyncGenerator[list[Event], None]:
        """A job's events after a sequence number, those that were and those that come, until it ends.

        Raises:
            NotFound: there is no such job, or it is deleted meanwhile.
        """
        while True:
            changed = self._changed.setdefault(job_id, asyncio.Event())
            try:
                job = await asyncio.to_thread(self._store.get, job_id)
            except NotFound:
                self.notify(job_id)  # it would be kept for ever: nothing happens to what is not there
                raise
            while after < job.last_sequence:
                events = await self._read(job_id, after)
                if not events:
                    break  # the job is being deleted
                after = events[-1].sequence
                if wanted := [event for event in events if not kinds or event.kind in kinds]:
                    yield wanted
            if job.state in TERMINAL:
                return
            await changed.wait()

    async def _read(self, job_id: str, after: int) -> list[Event]:
        key = (job_id, after)
        if key not in self._reads:
            task = asyncio.create_task(asyncio.to_thread(self._store.events, job_id, after))
            self._reads[key] = task
            task.add_done_callback(lambda _: self._reads.pop(key, None))
        return await asyncio.shield(self._reads[key])
