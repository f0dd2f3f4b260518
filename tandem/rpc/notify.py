"""systemd's notification protocol: a datagram to `$NOTIFY_SOCKET` for each message."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Tells systemd how the service is. It takes the variables away, lest children speak for us."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_pid, usec = os.environ.pop("WATCHDOG_PID", ""), os.environ.pop("WATCHDOG_USEC", "0")
        mine = address != "" and watchdog_pid in ("", str(os.getpid()))
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = int(usec) / 1e6 if mine and usec.isdecimal() else 0.0
        """Seconds within which systemd wants `WATCHDOG=1`; 0 if it does not."""

    def send(self, message: str) -> None:
        """Send `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=...`. Whether anybody listens is not known."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            with contextlib.suppress(OSError):
                sender.sendto(message.encode(), self._address)
