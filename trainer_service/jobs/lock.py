"""A file that one process holds. The kernel lets go of it when that process ends, however it does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tandem.errors import FailedPrecondition, Reason, ResourceExhausted, invalid
from trainer_service.jobs.folder import is_full


class FileLock:
    """Held from its making to `close` or the process's end. Its text says who holds it."""

    def __init__(self, path: Path, field: str = "folder") -> None:
        """Take it.

        Raises:
            FailedPrecondition: STORE_IN_USE, another process holds it.
            InvalidArgument: names `field`; the file cannot be written.
            ResourceExhausted: DISK_FULL.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise invalid(field, f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise FailedPrecondition(
                Reason.STORE_IN_USE,
                f"another trainer service, process {holder or 'unknown'}, holds {path}",
                metadata={"path": str(path), "pid": holder},
            ) from None
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(descriptor)
            if is_full(error):
                raise ResourceExhausted(Reason.DISK_FULL, f"the disk of {path} is full") from error
            raise invalid(field, f"cannot write {path}: {error.strerror}") from error
        self._descriptor = descriptor

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)
