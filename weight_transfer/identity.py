"""Where a process lives, so that two of them can tell beforehand whether they can share memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
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

    def why_not_shared(
        self, other: ProcessIdentity, members: Sequence[ProcessIdentity] = ()
    ) -> tuple[str, str]:
        """Why this process cannot share the policy's memory with `other`, and the field of its OpenSession that is at
        fault; both "" if it can.

        A PID namespace must be shared too: CUDA IPC fails across them, sometimes silently.

        Args:
            members: further ranks of a trainer whose first is `other`. Then all of them have to be on this host, and
                together on every GPU that holds the policy.
        """
        for field, each in (("identity", other), *((f"members[{i}]", m) for i, m in enumerate(members))):
            if self.boot_id != each.boot_id:
                return f"{field}.boot_id", "the two processes are on different hosts"
            if self.pid_namespace != each.pid_namespace:
                why = (
                    "the two processes are in different PID namespaces (containers): share one, as in one pod"
                )
                return f"{field}.pid_namespace", why
        theirs = tuple(gpu for each in (other, *members) for gpu in each.gpu_uuids)
        if members and set(self.gpu_uuids) <= set(theirs) and bool(self.gpu_uuids) == bool(theirs):
            return "", ""
        if self.gpu_uuids == theirs:
            return "", ""
        here, there = (", ".join(dict.fromkeys(gpus)) or "no GPU" for gpus in (self.gpu_uuids, theirs))
        why = f"the policy is on different devices: {here} here, {there} there"
        return "members" if members else "identity.gpu_uuids", why
