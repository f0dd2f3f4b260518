"""A job's folder: what is in it, and how the job's processes tell the service of themselves through it.

They only append to files that the service reads when it can: a service that was killed misses nothing, and a training
never waits for whoever watches it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tandem.errors import invalid
from tandem.rpc.address import MAX_UNIX_PATH_BYTES
from trainer_service.jobs.spec import JobSpec

_CHECKPOINT = "checkpoint-"
_STATE = "trainer_state.json"  # what transformers writes last
_ASIDE = ".new"  # of a file that is being written
#: The longest path of the folder's socket beside the folder's own.
SOCKET = "i.sock"
#: A longer line of output is cut.
MAX_LINE_BYTES = 8 << 10
#: Why a job failed whose checkpoint, event or output could not be written.
FULL = "DISK_FULL: the disk of the job's folder is full"
#: Kept on the disk, so that the end of an attempt can be told when nothing else fits there.
_RESERVE_BYTES = 64 << 10
#: Less than this free is a full disk, where a library says no more than that it could not write.
_SCARCE_BYTES = 1 << 20


class Outcome(StrEnum):
    """How an attempt ended. One that died told nothing."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    DIED = "DIED"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    path: Path
    nbytes: int
    time: float


class JobFolder:
    """The folder of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec_file = path / "spec.json"
        self.events_file = path / "events.jsonl"
        self.rollouts_file = path / "rollouts.jsonl"
        self.output_file = path / "output.log"
        self.engine_file = path / "engine.log"
        self.socket = path / SOCKET
        self.checkpoints_folder = path / "checkpoints"
        self._reserve_file = path / "reserve"

    def make(self, spec: JobSpec) -> None:
        """Make it, if it is not there."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.checkpoints_folder.mkdir(exist_ok=True)
        _write(self.spec_file, spec.model_dump_json(exclude_none=True))

    def reserve(self) -> None:
        """Keep room for telling an outcome. Raises OSError where there is none."""
        _write(self._reserve_file, "\n" * _RESERVE_BYTES)

    def spec(self) -> JobSpec:
        """The job's specification."""
        return JobSpec.model_validate_json(self.spec_file.read_bytes())

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():  # with the reason
            shutil.rmtree(self.path)

    @property
    def holds_sockets(self) -> bool:
        """Whether its path leaves room for sockets that are named by a UUID, as vLLM's are."""
        return len(os.fsencode(self.path)) + len(f"/{uuid.UUID(int=0)}") <= MAX_UNIX_PATH_BYTES

    def drop_sockets(self) -> None:
        """Remove what processes that have ended served at."""
        for path in self.path.glob("*"):
            if path.is_socket():
                path.unlink(missing_ok=True)

    def stop_file(self, attempt: int) -> Path:
        """Where it is, an attempt of several processes is to end."""
        return self.path / f"stop-{attempt}"

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, the oldest first."""
        found = []
        for path in self.checkpoints_folder.glob(f"{_CHECKPOINT}*"):
            try:
                step = json.loads((path / _STATE).read_bytes())["global_step"]
                files = [file.stat() for file in path.rglob("*") if file.is_file()]
                made = (path / _STATE).stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it is being written, or removed, or was not finished
            if path.name == f"{_CHECKPOINT}{step}":
                found.append(Checkpoint(step, path, sum(file.st_size for file in files), made))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def drop_incomplete(self) -> None:
        """Remove files and checkpoints that a killed process left half written, for while none writes."""
        for path in self.path.glob(f"*{_ASIDE}"):
            path.unlink(missing_ok=True)
        complete = {checkpoint.path for checkpoint in self.checkpoints()}
        for path in self.checkpoints_folder.glob(f"{_CHECKPOINT}*"):
            if path not in complete:
                shutil.rmtree(path)

    def outcome(self, attempt: int) -> tuple[Outcome, str]:
        """How an attempt ended that has ended, and why. Raises OSError where what was told cannot be read."""
        try:
            told = json.loads(self._outcome_file(attempt).read_bytes())
            return Outcome(told["outcome"]), str(told["reason"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Outcome.DIED, "its process was killed"

    def tell_outcome(
        self, attempt: int, outcome: Outcome, reason: str = "", *, over: Collection[Outcome] = ()
    ) -> None:
        """Say how an attempt ends. What was told first stays, unless it is one of `over`."""
        text = json.dumps({"outcome": outcome, "reason": reason})
        try:
            self._tell(attempt, text, over)
        except OSError as error:
            if not is_full(error):
                raise
            self._reserve_file.unlink(missing_ok=True)
            self._tell(attempt, text, over)

    def _tell(self, attempt: int, text: str, over: Collection[Outcome]) -> None:
        _write(self._outcome_file(attempt), text, first=True)
        if over and self.outcome(attempt)[0] in over:
            _write(self._outcome_file(attempt), text)

    def _outcome_file(self, attempt: int) -> Path:
        return self.path / f"outcome-{attempt}.json"


class LineLog:
    """Appends lines of JSON to a file. A line is written in one call, or it does not count."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # ends the line at which another was killed

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one. Raises OSError where the disk is full."""
        data = json.dumps(line).encode() + b"\n"
        if os.write(self._descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, "a line was not written whole")

    def close(self) -> None:
        os.close(self._descriptor)


class EventLog(LineLog):
    """Appends to a job's events."""

    def __init__(self, folder: JobFolder, attempt: int) -> None:
        super().__init__(folder.events_file)
        self._attempt = attempt

    def write(self, kind: str, body: Mapping[str, Any]) -> None:
        """Append an event. Raises OSError where the disk is full."""
        self.append({"kind": kind, "time": time.time(), "attempt": self._attempt, "body": body})


def read_lines(path: Path, offset: int, limit: int, *, rest: bool = False) -> tuple[list[bytes], int]:
    """Whole lines of a file from `offset`, of about `limit` bytes, and the offset after them.

    A line longer than `limit` comes in parts, and with `rest` so does one without an end: nobody will end it.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    if (end == 0 and len(data) == limit) or (rest and len(data) < limit):
        end = len(data)
    lines = data[:end].split(b"\n")  # not at a progress bar's returns
    return lines[:-1] if not lines[-1] else lines, offset + end


def _write(path: Path, text: str, *, first: bool = False) -> None:
    """Wholly, or not at all, also where another process writes the same file just then.

    Where it is there, it stays if this is to be the `first`.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_ASIDE}")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if first:
            _link(aside, path)
            aside.unlink(missing_ok=True)
        else:
            aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _link(aside: Path, path: Path) -> None:
    """Have `path` be `aside`, unless it is something already."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if not path.exists():  # the best that a file system without hard links has
            aside.replace(path)


def is_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether an error comes from a full disk, in whatever words. `folder` is where it was written to."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in text:  # safetensors'
            return True
        if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save's, of any failure
            return folder is not None and shutil.disk_usage(folder).free < _SCARCE_BYTES
        cause = cause.__cause__ or cause.__context__
    return False


def make_private(path: Path) -> Path:
    """The service's own folder, made if it is not there. Jobs run what is in it: nobody else may write to it.

    Raises:
        InvalidArgument: names `folder`.
    """
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise invalid("folder", f"cannot make {path}: {error.strerror}") from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise invalid("folder", f"{path} is another user's, or others may write to it")
    return path
