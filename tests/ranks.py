"""Processes that make a group of two, for tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: For accelerate to use gloo.
ON_CPU = {"ACCELERATE_USE_CPU": "true"}


@contextmanager
def two_ranks(*command: object, **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two of `python command...`, told of each other by gloo's environment; whatever happens, neither is left."""
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _port() -> int:
    """One that nobody listens at, and that nobody who asks for any port is given before the ranks are there."""
    end = min(int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]), 32768)
    for _ in range(1000):
        port = 10_000 + secrets.randbelow(max(end - 10_000, 1))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def of_script(script: str, *arguments: object) -> tuple[object, ...]:
    """The command of a script given as text."""
    return "-c", textwrap.dedent(script), *arguments


def ended(ranks: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    with ThreadPoolExecutor() as pool:  # at once: one that nobody reads stands still
        outputs = list(pool.map(lambda rank: rank.communicate(timeout=seconds)[0], ranks))
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def succeeded(ranks: list[subprocess.Popen[str]], seconds: float = 120) -> list[str]:
    """The output of each, which must end well."""
    ends = ended(ranks, seconds)
    assert [code for code, _ in ends] == [0, 0], "\n\n".join(output[-3000:] for _, output in ends)
    return [output for _, output in ends]
