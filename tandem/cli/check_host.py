"""Checks of the host: packages, shared memory, room. Nothing heavy is loaded."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tandem.cli.findings import Finding, bad, dotted, free, gib, installed, note, ok

#: Versions that the tests run with: every one from the first to before the last.
SUPPORTED = {
    "vllm": ((0, 26), (0, 32)),
    "trl": ((1, 16), (1, 17)),
    "torch": ((2, 11), (2, 14)),
    "grpcio": ((1, 80, 1), (2,)),
    "protobuf": ((6, 33, 5), (8,)),
}
_SHM = Path("/dev/shm")  # noqa: S108  # the mount itself is what is looked at
_SHM_BYTES = 1 << 30
_FREE_BYTES = 5 << 30


def python() -> Iterator[Finding]:
    """Python and the packages, against the versions that are tested."""
    yield ok("python", ".".join(map(str, sys.version_info[:3])))
    missing = []
    for name, (first, last) in SUPPORTED.items():
        if (have := installed(name)) is None:
            missing.append(name)
            continue
        wanted = f"{dotted(first)} or newer, and older than {dotted(last)}"
        if first <= _numbers(have) < last:
            yield ok(name, have)
        else:
            yield bad(name, have, f"install {wanted}")
    sides = {"vllm": "the inference service", "trl": "the trainer service", "torch": "either service"}
    for name in missing:
        what = f"not installed: {sides.get(name, 'nothing')} cannot run in this environment"
        neither = {"vllm", "trl"} <= set(missing)
        extra = {"vllm": "inference", "trl": "trainer"}.get(name, "inference,trainer")
        make = bad if name not in ("vllm", "trl") or neither else note
        yield make(name, what, f"pip install tandem[{extra}]")
    if find_spec("weight_transfer") is None or find_spec("weight_transfer._core") is None:
        yield bad(
            "extension",
            "weight_transfer._core is not built",
            "pip install . in Tandem's folder: it needs g++",
        )
    else:
        yield ok("extension", "built")


def ipc() -> Iterator[Finding]:
    """Whether weights can be shared with another process of this host."""
    try:
        _pass_memory()
        yield ok("memory sharing", "sealed memory passes over a Unix socket")
    except OSError as error:
        yield bad(
            "memory sharing",
            f"memfd_create, its seals or SCM_RIGHTS: {error.strerror}",
            "use Linux 3.17 or newer, and a container whose seccomp profile allows memfd_create",
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
        yield ok("process watching", "pidfd_open works")
    except OSError as error:
        yield note(
            "process watching", f"pidfd_open: {error.strerror}; /proc is looked at instead", "use Linux 5.3"
        )
    room = free(_SHM)
    if room is None:
        yield bad("shared memory", f"{_SHM} is not there", f"mount a tmpfs at {_SHM}")
    elif room < _SHM_BYTES:
        yield bad(
            "shared memory",
            f"{gib(room)} free in {_SHM}",
            "give it 1 GiB or more: docker run --shm-size=8g",
        )
    else:
        yield ok("shared memory", f"{gib(room)} free in {_SHM}")


def _pass_memory() -> None:
    """Send sealed memory to ourselves over a Unix socket, and read it there. Raises OSError where that fails."""
    text = b"tandem"
    memory = os.memfd_create("tandem-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memory, mmap.PAGESIZE)
        os.pwrite(memory, text, 0)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with here, there:
            there.settimeout(5)
            socket.send_fds(here, [b"x"], [memory])
            _, (received,), _, _ = socket.recv_fds(there, 1, 1)
        try:
            with mmap.mmap(received, mmap.PAGESIZE, prot=mmap.PROT_READ) as view:
                if view[: len(text)] != text:
                    raise OSError(0, "what arrived is not what was sent")
        finally:
            os.close(received)
    finally:
        os.close(memory)


def disk() -> Iterator[Finding]:
    """Whether there is room for what is written."""
    temporary = Path(tempfile.gettempdir())
    room = free(temporary)
    if room is not None and room < _FREE_BYTES:
        yield note(
            "disk", f"{gib(room)} free in {temporary}", "checkpoints need several times the model's size"
        )
    elif room is not None:
        yield ok("disk", f"{gib(room)} free in {temporary}")


def _numbers(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.partition("+")[0].split("."):
        digits = "".join(c for c in part if c.isdecimal())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
