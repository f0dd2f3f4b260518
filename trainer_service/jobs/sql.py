"""The store in a database, by SQLAlchemy: SQLite, and PostgreSQL for those who have it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from tandem.errors import FailedPrecondition, NotFound, Reason, ResourceExhausted, Unavailable, invalid
from trainer_service.jobs import tables
from trainer_service.jobs.lock import FileLock
from trainer_service.jobs.spec import JobSpec
from trainer_service.jobs.states import TERMINAL, JobState, Move, after
from trainer_service.jobs.store import Event, EventKind, Job, Offsets, Store

_FULL = ("database or disk is full", "disk i/o error", "no space left", "53100")
_LOCK_KEY = 0x7461_6E64_656D  # of PostgreSQL's advisory lock: "tandem"
_BUSY_S = 30.0
_RETRY_S = 1.0
_KEPT = 10_000
_AT_ONCE = 1000
#: A job's columns but for its specification, which never changes. What is JSON comes as text, to be compared.
_COLUMNS = (
    *(
        column
        for column in tables.jobs.c
        if not isinstance(column.type, sa.JSON) and column.name != "request_id"
    ),
    *(sa.cast(column, sa.Text).label(column.name) for column in (tables.jobs.c.gpus, tables.jobs.c.offsets)),
)


class SqlStore(Store):
    """A store in a database."""

    def __init__(self, url: str) -> None:
        """Open it, and bring its tables up to date. Raises InvalidArgument, naming `store`, where that cannot be."""
        try:
            parsed = sa.make_url(url)
            self._engine = sa.create_engine(parsed, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise invalid("store", f"cannot open it: {error}") from error
        self._lite = parsed.get_backend_name() == "sqlite"
        self._path = Path(parsed.database or "jobs.db")
        self._held: FileLock | sa.Connection | None = None
        self._guard = threading.Lock()  # of the connection that is held
        #: By their numbers jobs, each with the row that it was made of: most of a list is as it was in the last one.
        self._made: dict[int, tuple[tuple[Any, ...], Job]] = {}
        if self._lite:
            sa.event.listen(self._engine, "connect", _configure)
            sa.event.listen(self._engine, "begin", _begin)
        self._migrated = False

    def lock(self) -> None:
        if self._lite:
            self._held = FileLock(self._path.with_suffix(".lock"), "store")
        else:
            self._held = self._locked_connection()
        # Not before: a newer service must not change the tables under one that runs.
        with _told(), self._engine.begin() as connection:
            _upgrade(connection)

    def create(self, job_id: str, spec: JobSpec, request_id: str = "") -> Job:
        now = time.time()
        stored = spec.model_dump(mode="json", exclude_none=True)
        with _told(), self._writing() as connection:
            if not self._lite:  # or two of one request at once find neither
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY + 1)))
            if request_id and (row := _requested(connection, request_id, stored)) is not None:
                return self._job(connection, row)
            values = {"id": job_id, "request_id": request_id or None, "spec": stored, "create_time": now}
            added = connection.execute(tables.jobs.insert().values(**values, state=JobState.QUEUED))
            number = added.inserted_primary_key[0]  # type: ignore[index]  # an insert of one row has it
            if spec.labels:
                rows = [{"job": number, "key": key, "value": value} for key, value in spec.labels.items()]
                connection.execute(tables.labels.insert(), rows)
            state = {"state": JobState.QUEUED, "reason": ""}
            return self._append(
                connection, _locked(connection, job_id), [Event(EventKind.STATE, now, 0, state)]
            )

    def requested(self, request_id: str, spec: JobSpec) -> Job | None:
        stored = spec.model_dump(mode="json", exclude_none=True)
        with _told(), self._reading() as connection:
            row = _requested(connection, request_id, stored)
            return None if row is None else self._job(connection, row)

    def get(self, job_id: str) -> Job:
        with _told(), self._reading() as connection:
            return self._job(connection, _row(connection, job_id))

    def find(
        self,
        *,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] | None = None,
        limit: int = 0,
        before: int = 0,
    ) -> list[Job]:
        query = sa.select(*_COLUMNS).order_by(tables.jobs.c.number.desc())
        if states:
            query = query.where(tables.jobs.c.state.in_(list(states)))
        if before:
            query = query.where(tables.jobs.c.number < before)
        for key, value in (labels or {}).items():
            having = sa.select(tables.labels.c.job).where(
                tables.labels.c.key == key, tables.labels.c.value == value
            )
            query = query.where(tables.jobs.c.number.in_(having))
        if limit:
            query = query.limit(limit)
        with _told(), self._reading() as connection:
            return self._jobs(connection, connection.execute(query).all())

    def count(self) -> dict[JobState, int]:
        query = sa.select(tables.jobs.c.state, sa.func.count()).group_by(tables.jobs.c.state)
        with _told(), self._reading() as connection:
            found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    def move(self, job_id: str, move: Move, reason: str = "", **changes: Any) -> Job:
        with _told(), self._writing() as connection:
            row = _locked(connection, job_id)
            old = JobState(row.state)
            new = after(job_id, old, move)
            reason = reason.replace("\0", "?").encode(errors="replace").decode()  # whatever a library raised
            if new is old:
                return self._job(connection, row)
            body = {"old_state": old, "state": new, "reason": reason}
            if new in TERMINAL:
                changes.setdefault("end_time", time.time())
            event = Event(EventKind.STATE, time.time(), changes.get("attempt", row.attempt), body)
            return self._append(connection, row, [event], state=new, reason=reason, **changes)

    def append(self, job_id: str, events: Sequence[Event], **changes: Any) -> Job:
        with _told(), self._writing() as connection:
            return self._append(connection, _locked(connection, job_id), events, **changes)

    def events(
        self, job_id: str, after: int = 0, kinds: Collection[EventKind] = (), limit: int = 500
    ) -> list[Event]:
        number = sa.select(tables.jobs.c.number).where(tables.jobs.c.id == job_id).scalar_subquery()
        query = (
            sa.select(tables.events)
            .where(tables.events.c.job == number, tables.events.c.sequence > after)
            .order_by(tables.events.c.sequence)
            .limit(limit)
        )
        if kinds:
            query = query.where(tables.events.c.kind.in_(list(kinds)))
        with _told(), self._reading() as connection:
            return [
                Event(EventKind(row.kind), row.time, row.attempt, row.body, row.sequence)
                for row in connection.execute(query)
            ]

    def delete(self, job_id: str) -> None:
        with _told(), self._writing() as connection:
            number = _locked(connection, job_id).number
            for table in (tables.events, tables.labels):
                connection.execute(table.delete().where(table.c.job == number))
            connection.execute(tables.jobs.delete().where(tables.jobs.c.number == number))
        self._made.pop(number, None)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
        self._engine.dispose()

    def _append(
        self, connection: sa.Connection, row: sa.Row[Any], events: Sequence[Event], **changes: Any
    ) -> Job:
        first = row.last_sequence + 1
        rows = [
            {
                "job": row.number,
                "sequence": sequence,
                "kind": event.kind,
                "time": event.time,
                "attempt": event.attempt,
                "body": dict(event.body),
            }
            for sequence, event in enumerate(events, first)
        ]
        if rows:
            connection.execute(tables.events.insert(), rows)
        if "offsets" in changes:
            changes["offsets"] = dataclasses.asdict(changes["offsets"])
        changes["last_sequence"] = row.last_sequence + len(rows)
        update = tables.jobs.update().where(tables.jobs.c.number == row.number).values(**changes)
        connection.execute(update)
        return self._job(connection, _row(connection, row.id))

    def _job(self, connection: sa.Connection, row: sa.Row[Any]) -> Job:
        found = self._jobs(connection, [row])
        if not found:
            raise _missing(row.id)
        return found[0]

    def _jobs(self, connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Job]:
        """Rows of `_COLUMNS` as jobs, but for those that were deleted since they were read."""
        if len(self._made) + len(rows) > _KEPT:
            self._made.clear()
        known = {row.number: self._made.get(row.number) for row in rows}
        specs = _specs(connection, [number for number, made in known.items() if made is None])
        found = []
        for row in rows:
            values, made = tuple(row), known[row.number]
            if made is None or made[0] != values:
                if made is None and row.number not in specs:
                    continue
                made = (values, _job(row, specs[row.number] if made is None else made[1].spec))
                self._made[row.number] = made
            found.append(made[1])
        return found

    def _locked_connection(self) -> sa.Connection:
        """The lock is the connection's: the database lets go of it when this process ends, however that comes."""
        connection = self._connected()
        connection.detach()  # it is none of the pool's, and ends when it is closed
        got = connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK_KEY)))
        connection.commit()
        if not got:
            connection.close()
            raise FailedPrecondition(Reason.STORE_IN_USE, "another trainer service runs on this store")
        return connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction, of whoever has the lock still: a database that was started again has forgotten it."""
        with self._guard:
            if isinstance(self._held, sa.Connection):
                self._held = self._still(self._held)
        with self._engine.begin() as connection:
            yield connection

    def _still(self, held: sa.Connection) -> sa.Connection:
        if not held.closed and not held.invalidated:
            try:
                held.execute(sa.select(1))
                held.commit()
                return held
            except DBAPIError:
                held.close()
        return self._locked_connection()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """A connection that takes no lock: one statement of SQLite's sees one state of the file by itself."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    def _connected(self) -> sa.Connection:
        try:
            return self._engine.connect()
        except DBAPIError as error:
            raise invalid("store", f"cannot open it: {_said(error)}") from error


def _configure(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin below, not where the driver thinks best
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a job that was answered for outlives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    if connection.get_isolation_level() != "AUTOCOMMIT":
        # At once for writing: a lock that is raised later fails where two transactions read first.
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(connection: sa.Connection) -> None:
    import alembic.command
    import alembic.config

    config = alembic.config.Config()
    config.set_main_option("script_location", "trainer_service.jobs:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


def _row(connection: sa.Connection, job_id: str, *, lock: bool = False) -> sa.Row[Any]:
    """A job's `_COLUMNS`."""
    query = sa.select(*_COLUMNS).where(tables.jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise _missing(job_id)
    return row


def _missing(job_id: str) -> NotFound:
    return NotFound(Reason.JOB_NOT_FOUND, f"there is no job {job_id!r}", metadata={"job_id": job_id[:128]})


def _specs(connection: sa.Connection, numbers: Sequence[int]) -> dict[int, JobSpec]:
    found = {}
    for start in range(0, len(numbers), _AT_ONCE):
        wanted = tables.jobs.c.number.in_(numbers[start : start + _AT_ONCE])
        for number, spec in connection.execute(
            sa.select(tables.jobs.c.number, tables.jobs.c.spec).where(wanted)
        ):
            found[number] = JobSpec.model_validate(spec)
    return found


def _job(row: sa.Row[Any], spec: JobSpec) -> Job:
    values = dict(row._mapping)
    values |= {"spec": spec, "state": JobState(row.state)}
    return Job(
        **values | {"offsets": Offsets(**json.loads(row.offsets)), "gpus": tuple(json.loads(row.gpus))}
    )


def _requested(connection: sa.Connection, request_id: str, stored: dict[str, Any]) -> sa.Row[Any] | None:
    """The `_COLUMNS` of the job that a request made. Raises InvalidArgument where `stored` is another one."""
    query = sa.select(tables.jobs.c.id, tables.jobs.c.spec).where(tables.jobs.c.request_id == request_id)
    found = connection.execute(query).one_or_none()
    if found is None:
        return None
    # Read, since fields may have been added to what was stored before.
    if JobSpec.model_validate(found.spec) != JobSpec.model_validate(stored):
        raise invalid("request_id", f"{request_id!r} made another job before, {found.id}")
    return _row(connection, found.id)


def _locked(connection: sa.Connection, job_id: str) -> sa.Row[Any]:
    return _row(connection, job_id, lock=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the database says as an error of ours. The transaction was rolled back by then."""
    try:
        yield
    except DBAPIError as error:
        text = f"{error.orig} {getattr(error.orig, 'sqlstate', '')}".lower()
        if any(sign in text for sign in _FULL):
            raise ResourceExhausted(
                Reason.DISK_FULL, "the disk of the store is full: nothing was changed"
            ) from error
        if isinstance(
            error, OperationalError | InterfaceError
        ):  # it is locked for long, restarts, cannot be reached
            raise Unavailable(
                Reason.UNREACHABLE, f"the store does not answer: {_said(error)}", retry_after=_RETRY_S
            ) from error
        raise


def _said(error: DBAPIError) -> str:
    """What the driver says, in one line."""
    return " ".join(str(error.orig).split())[:500]
