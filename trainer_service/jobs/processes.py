"""Processes of jobs: known again after the service was killed, and ended with all that they started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: In the environment of every process of a job: the job's folder.
MARK = "TANDEM_JOB"
_POLL_S = 0.02


@cache
def boot_id() -> str:
    """This start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that is never taken for another one: ids come again, a start time with them does not."""

    pid: int
    started: int
    """In clock ticks since the machine's start."""
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Of a process that is there. Raises ProcessLookupError."""
        return cls(pid, _fields(pid)[2], boot_id())

    @classmethod
    def parse(cls, text: str) -> Identity | None:
        """What `str` made; None of an empty text."""
        if not text:
            return None
        pid, started, boot = text.split()
        return cls(int(pid), int(started), boot)

    def __str__(self) -> str:
        return f"{self.pid} {self.started} {self.boot}"

    @property
    def alive(self) -> bool:
        """Whether it runs; one that ended and was not waited for does not."""
        if self.boot != boot_id():
            return False
        try:
            state, _, started, _ = _fields(self.pid)
        except ProcessLookupError:
            return False
        return started == self.started and state not in "ZX"

    def open(self) -> int | None:
        """A descriptor that is readable once it has ended; None if it has by now."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive:
            return descriptor
        os.close(descriptor)
        return None

    @property
    def session(self) -> int:
        """The session that it leads or led. -1 where the id is another's by now: then nobody is left in it."""
        with contextlib.suppress(ProcessLookupError):
            if _fields(self.pid)[2] != self.started:
                return -1
        return self.pid if self.boot == boot_id() else -1

    def send(self, number: int) -> None:
        """Send a signal, if it runs."""
        descriptor = self.open()
        if descriptor is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def members(folder: Path, root: Identity | None = None) -> set[int]:
    """Ids of the processes of the job in `folder`, wherever they went.

    A process may have left its parent, its session, or written over its environment, but hardly all three. Where
    `root` is no more, a session of its id may be another's by now: it counts if one in it has the job's mark.
    """
    mark = f"{MARK}={folder}".encode()
    session = root.session if root is not None else -1
    parents: dict[int, int] = {}
    found, there, led = set(), set(), False
    for pid in _processes():
        try:
            state, parent, _, sid = _fields(pid)
            led = led or pid == session  # also where it has ended, and nobody has waited for it
            if state in "ZX" or pid == os.getpid():
                continue
            parents[pid] = parent
            if sid == session:
                there.add(pid)
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # it ended, or is another user's
    if led or there & found:
        found |= there
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def kill(folder: Path, root: Identity | None, timeout_s: float = 30.0) -> None:
    """Kill every process of the job in `folder`, and return once none is left.

    Raises:
        TimeoutError: one does not end, as one that waits for a broken disk.
    """
    deadline = time.monotonic() + timeout_s
    while left := members(folder, root):
        stopped: set[int] = set()
        while new := left - stopped:  # or one would start another, which nothing ties to it once it is dead
            _send(new, signal.SIGSTOP)
            stopped |= new
            left = members(folder, root)
        _send(stopped, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(left)} of the job in {folder} do not end")
        time.sleep(_POLL_S)


def _send(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def wait_any(descriptors: list[int]) -> None:
    """Wait until one of the processes of these descriptors has ended."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _fields(pid: int) -> tuple[str, int, int, int]:
    """State, parent, start time and session."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    fields = text.rpartition(")")[2].split()  # the name before may have anything in it
    return fields[0], int(fields[1]), int(fields[19]), int(fields[3])
