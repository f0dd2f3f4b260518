"""Where a process lives."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import psutil
import pytest

from weight_transfer.identity import ProcessIdentity

HERE = ProcessIdentity("boot", 4026531836, 10, 1000, ("GPU-1",))


def test_this_process() -> None:
    mine = ProcessIdentity.current(("GPU-1",))
    assert (mine.pid, mine.gpu_uuids) == (os.getpid(), ("GPU-1",))
    assert len(mine.boot_id) == 36
    ticks = os.sysconf("SC_CLK_TCK")
    assert mine.start_time / ticks == pytest.approx(
        psutil.Process().create_time() - psutil.boot_time(), abs=2
    )
    assert mine == ProcessIdentity.current(("GPU-1",))


def test_a_process_whose_name_is_meant_to_confuse() -> None:
    """/proc/self/stat has the name in it, unescaped."""
    script = (
        "import ctypes\n"
        "ctypes.CDLL(None).prctl(15, b') R 1 (a 7 7', 0, 0, 0)\n"
        "from weight_transfer.identity import ProcessIdentity\n"
        "me = ProcessIdentity.current()\n"
        "print(me.boot_id, me.pid_namespace, me.start_time)"
    )
    before = ProcessIdentity.current().start_time
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    boot_id, namespace, start = done.stdout.split()
    mine = ProcessIdentity.current()
    assert (boot_id, int(namespace)) == (mine.boot_id, mine.pid_namespace)
    assert int(start) > before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pid": 11, "start_time": 2000}, ""),
        ({"boot_id": "other"}, "the two processes are on different hosts"),
        (
            {"pid_namespace": 1},
            "the two processes are in different PID namespaces (containers): share one, as in one pod",
        ),
        ({"gpu_uuids": ()}, "the policy is on different devices: GPU-1 here, no GPU there"),
        (
            {"gpu_uuids": ("GPU-1", "GPU-2")},
            "the policy is on different devices: GPU-1 here, GPU-1, GPU-2 there",
        ),
    ],
)
def test_who_shares_memory(change: dict[str, object], why: str) -> None:
    other = dataclasses.replace(HERE, **change)  # type: ignore[arg-type]
    field = f"identity.{min(change)}" if why else ""
    assert HERE.why_not_shared(other) == (field, why)
    assert bool(other.why_not_shared(HERE)[1]) == bool(why)


def test_the_farthest_difference_is_named() -> None:
    other = ProcessIdentity("other", 1, 1, 1, ())
    assert HERE.why_not_shared(other) == ("identity.boot_id", "the two processes are on different hosts")
