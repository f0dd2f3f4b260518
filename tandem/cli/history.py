"""What happened to a job so far, without waiting for more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TypeVar

from tandem.client import Event, Job

_E = TypeVar("_E", bound=Event)
_PATIENCE_S = 600.0


def history(job: Job, kind: type[_E]) -> Iterator[_E]:
    """The job's events of a kind, up to the last one that it has by now."""
    last = job.last_sequence
    if last == 0:
        return
    # A stream of one kind would not say when it has come so far, unless the job is over.
    kinds = [kind] if job.state.is_over else []
    with closing(job.watch(kinds=kinds, timeout_s=_PATIENCE_S)) as events:
        for event in events:
            if isinstance(event, kind):
                yield event
            if event.sequence >= last:
                return
