"""A job's handle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import Self

from tandem.client._aio.calls import Calls
from tandem.client.values import KINDS, Checkpoint, Event, StateChange, checkpoint_of, event_of
from tandem.client.view import JobView
from tandem.errors import DeadlineExceeded, Reason, Unavailable
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb

#: Seconds after which a watch that nothing ended is opened again: no call goes without a deadline.
_WATCH_S = 300.0
#: Seconds between two tries to reach a service that is away.
_AWAY_S = 0.5
#: A stream that lasted this long had reached the service.
_STAYED_S = 10.0
#: Seconds until a stream that ended in order is opened again.
_AGAIN_S = 0.1
#: A job is deleted once its processes are gone, which get time to end.
_DELETE_S = 180.0


class AsyncJob(JobView):
    """One job: its state as last told, and what can be done with it. Made by the client.

    `refresh` asks anew; so do `cancel`, `resume`, and `watch` and `result` at their end.
    """

    def __init__(self, calls: Calls, message: job_pb2.Job, timeout_s: float, patience_s: float) -> None:
        super().__init__(message)
        self._calls, self._timeout_s, self._patience_s = calls, timeout_s, patience_s

    async def refresh(self) -> Self:
        """Ask the service how the job is. Returns this handle.

        Raises:
            NotFound: it was deleted.
        """
        answer = await self._calls.one("GetJob", pb.GetJobRequest(job_id=self.id), self._timeout_s)
        self._message = answer.job
        return self

    async def watch(
        self, after: int = 0, kinds: Collection[type[Event]] = (), timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """The job's events, those that happened before first, until the job is over.

        It goes on by itself after a lost connection or a restart of the service: no event is left out, and none
        comes twice.

        Args:
            after: the last sequence number that the caller has; 0 begins with the first.
            kinds: only events of these classes; all if none is named.
            timeout_s: seconds after which to give up. None waits for as long as the job takes.

        Raises:
            NotFound: the job was deleted.
            DeadlineExceeded: the job is not over after `timeout_s`.
            Unavailable: the service stays away for longer than the client's `patience_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen, wanted, away_since = after, [KINDS[kind] for kind in kinds], 0.0
        while True:
            request = pb.WatchJobRequest(job_id=self.id, after_sequence=seen, kinds=wanted)
            opened, found = time.monotonic(), False
            left = _WATCH_S if deadline is None else min(_WATCH_S, max(deadline - opened, 0.0))
            try:
                async with aclosing(self._calls.many("WatchJob", request, left)) as responses:
                    async for response in responses:
                        for message in response.events:
                            if message.sequence > seen:
                                seen, found = message.sequence, True
                                yield event_of(message)
                await self.refresh()
            except (Unavailable, DeadlineExceeded) as error:
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    late = f"job {self.id} is not over after {timeout_s:g} s"
                    raise DeadlineExceeded(Reason.DEADLINE, late) from error
                if isinstance(error, DeadlineExceeded):  # nothing is wrong but that the call was long
                    continue
                if found or not away_since or now - opened > _STAYED_S:
                    away_since = now
                if now - away_since > self._patience_s:
                    raise
                await asyncio.sleep(_AWAY_S)
                continue
            # It ended in order: the job is over, or the service stops. Where events came, there may be more.
            away_since = 0.0
            if self.state.is_over and (seen >= self.last_sequence or not found):
                return
            await asyncio.sleep(_AGAIN_S)

    async def result(self, timeout_s: float | None = None) -> Checkpoint | None:
        """Wait until the job is over. Returns its last checkpoint; None where it saved none.

        Args:
            timeout_s: seconds to wait; None waits for as long as the job takes.

        Raises:
            FailedPrecondition: JOB_FAILED, with the reason.
            Cancelled: JOB_CANCELLED.
            DeadlineExceeded: it is not over after `timeout_s`. It goes on.
            NotFound, Unavailable: as `watch`.
        """
        async with aclosing(self.watch(self.last_sequence, [StateChange], timeout_s)) as changes:
            async for _ in changes:
                pass
        self._raise_unless_succeeded()
        saved = await self.checkpoints()
        return saved[-1] if saved else None

    async def cancel(self) -> Self:
        """Have the job end. It saves a checkpoint if it can: `result` waits for that. Returns this handle."""
        request = pb.CancelJobRequest(job_id=self.id)
        self._message = (await self._calls.one("CancelJob", request, self._timeout_s, repeat=True)).job
        return self

    async def resume(self) -> Self:
        """Have a failed or cancelled job go on from its last checkpoint. Returns this handle.

        Raises:
            FailedPrecondition: JOB_STATE, there is nothing to resume.
        """
        request = pb.ResumeJobRequest(job_id=self.id)
        self._message = (await self._calls.one("ResumeJob", request, self._timeout_s)).job
        return self

    async def delete(self, timeout_s: float = _DELETE_S) -> None:
        """End the job's processes, and remove all of it: folder, checkpoints, events."""
        await self._calls.one("DeleteJob", pb.DeleteJobRequest(job_id=self.id), timeout_s)

    async def checkpoints(self) -> list[Checkpoint]:
        """Its complete checkpoints, the oldest first."""
        request = pb.ListCheckpointsRequest(job_id=self.id)
        answer = await self._calls.one("ListCheckpoints", request, self._timeout_s)
        return [checkpoint_of(message) for message in answer.checkpoints]
