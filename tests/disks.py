"""Small disks that tests can fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own at `path`. Skips the test where this user may not mount one."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    path.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=60)


def fill(path: Path, left: int = 0) -> Path:
    """Fill the disk of the folder `path` but for `left` bytes. The file that does."""
    filler = path / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        state = os.statvfs(path)
        os.posix_fallocate(descriptor, 0, max(1, state.f_bavail * state.f_frsize - left))
    finally:
        os.close(descriptor)
    return filler
