"""From the files that a job's processes append to, into the store: each line once, whoever is killed meanwhile."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import structlog

from trainer_service.jobs.folder import MAX_LINE_BYTES, JobFolder, read_lines
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import Event, EventKind, Job, Store

log = structlog.get_logger(__name__)

#: Bytes of one file that become one transaction.
_LIMIT = 256 << 10
_RUN = "RUN"
_KINDS = frozenset(EventKind)
#: What is read of an event here.
_NEEDED = {_RUN: frozenset({"max_steps"}), EventKind.METRICS: frozenset({"step", "max_steps", "epoch"})}


def ingest(store: Store, folder: JobFolder, job: Job, *, rest: bool = False) -> tuple[Job, bool]:
    """Take what is new. With the events the store keeps how far they were read, so that none comes twice.

    Args:
        store: the store.
        folder: the job's.
        job: as it was last.
        rest: whether nobody writes any more, so that a line without an end is taken too.

    Returns:
        The job as it is now, and whether anything was new.
    """
    lines, events_end = read_lines(folder.events_file, job.offsets.events, _LIMIT)
    output, output_end = _output(folder.output_file, job.offsets.output, rest)
    engine, engine_end = _output(folder.engine_file, job.offsets.engine, rest)
    offsets = dataclasses.replace(job.offsets, events=events_end, output=output_end, engine=engine_end)
    if offsets == job.offsets:
        return job, False
    told = [record for line in lines if (record := _record(line)) is not None]
    changes: dict[str, Any] = {}
    for record in told:
        body = record["body"]
        if record["kind"] == _RUN and record["attempt"] == job.attempt:
            changes["max_steps"] = body["max_steps"]
        elif record["kind"] == EventKind.METRICS:
            changes |= {name: body[name] for name in ("step", "max_steps", "epoch")}
    if job.state is JobState.STARTING and any(
        record["kind"] == _RUN and record["attempt"] == job.attempt for record in told
    ):
        # Before the lines are: if this process is killed in between, the state tells that it was done.
        job = store.move(job.id, Move.RUN, start_time=time.time())
    events = [
        Event(EventKind(record["kind"]), record["time"], record["attempt"], record["body"])
        for record in told
        if record["kind"] in _KINDS
    ]
    now = time.time()
    for text in output + engine:
        events.append(Event(EventKind.LOG, now, job.attempt, {"text": text}))
    return store.append(job.id, events, offsets=offsets, **changes), True


def _output(path: Path, offset: int, rest: bool) -> tuple[list[str], int]:
    lines, end = read_lines(path, offset, _LIMIT, rest=rest)
    texts = []
    for line in lines:
        # A progress bar writes over itself: what it came to is the line.
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rpartition("\r")[2].rstrip()
        if text:
            texts.append(text)
    return texts, end


def _record(line: bytes) -> dict[str, Any] | None:
    """An event of the file, or None where its writer was killed within the line, or was not ours."""
    try:
        record: dict[str, Any] = json.loads(line)
        known = {"kind", "time", "attempt", "body"} <= record.keys()
        known = known and _NEEDED.get(record["kind"], frozenset()) <= record["body"].keys()
    except (ValueError, AttributeError, TypeError):
        known = False
    if not known:
        log.warning("an event was not written whole", line=line[:200])
        return None
    return record
