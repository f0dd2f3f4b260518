"""Folders of a process for its sockets and copies. What one that was killed left there, the next removes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "lock"
_NAME = "tandem-{}-{}"


class Folder:
    """A new folder among the temporary files, which only this user can enter. It lasts until `remove`.

    The process holds a lock in it, of which the kernel lets go however that process ends.
    """

    def __init__(self, kind: str) -> None:
        """Make one. Raises OSError where that cannot be.

        Args:
            kind: a word for its name.
        """
        _sweep()
        unnamed = Path(tempfile.mkdtemp(prefix=".tandem-"))
        self.path, self._lock = unnamed, -1
        try:
            self._lock = os.open(unnamed / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            # It has its name once it is locked: whoever sweeps sees no other.
            self.path = unnamed.rename(unnamed.parent / _NAME.format(kind, unnamed.name.rpartition("-")[2]))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove it with all that is in it. Nothing happens the second time."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


@functools.cache
def _sweep() -> None:
    """Remove this user's folders whose process is gone. Once in a process: there may be many files to look at."""
    for path in Path(tempfile.gettempdir()).glob(_NAME.format("*", "*")):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.geteuid():
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
