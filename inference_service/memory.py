"""How much memory the host, or the container, still has for an update to wait in."""

from __future__ import annotations

from pathlib import Path

import psutil

#: Memory, in bytes, that must be left once a whole update is staged: for the engine's own needs meanwhile.
HEADROOM = 1 << 28

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(cgroup: Path = _CGROUP) -> int:
    """Bytes that can be taken without anything being swapped out or killed.

    Args:
        cgroup: where the limits of this process are, as version 2 of cgroups has them, and a container sees them.
    """
    free: int = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        kept = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limits, or version 1, whose hosts have little else to say
        return free
    if limit == "max":
        return free
    # Files that were read and not for a while are given up first.
    return max(min(free, int(limit) - used + int(kept.get("inactive_file", 0))), 0)
