"""Where a process lives, so that two of them can tell beforehand whether they can share memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A host boot, a PID namespace, one process life in it, and the GPUs that hold the policy, by rank."""

    boot_id: str
    pid_namespace: int
    pid: int
    start_time: int
    gpu_uuids: tuple[str, ...] = ()

    @classmethod
    def current(cls, gpu_uuids: tuple[str, ...] = ()) -> ProcessIdentity:
        """This process's own."""
        # The process name, in parentheses, may hold spaces: count the fields after it. The 22nd is the start.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return cls(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
            pid=os.getpid(),
            start_time=int(fields[19]),
            gpu_uuids=gpu_uuids,
        )

    def why_not_shared(self, other: ProcessIdentity) -> str:
        """Why this process and `other` cannot share the policy's memory; "" if they can.

        A PID namespace must be shared too: CUDA IPC fails across them, sometimes silently.
        """
        if self.boot_id != other.boot_id:
            return "the two processes are on different hosts"
        if self.pid_namespace != other.pid_namespace:
            return "the two processes are in different PID namespaces (containers): share one, as in one pod"
        if self.gpu_uuids != other.gpu_uuids:
            mine, theirs = (", ".join(p.gpu_uuids) or "no GPU" for p in (self, other))
            return f"the policy is on different devices: {mine} here, {theirs} there"
        return ""
