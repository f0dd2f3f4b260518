"""The engine's processes end with the service, however it ends: left behind, they would hold the weights' memory."""

from __future__ import annotations

import os
import select
import threading

_SERVICE = "TANDEM_SERVICE_PID"


def adopt() -> None:
    """In the service, before it starts anything: what is started from here on can tell whose it is."""
    os.environ[_SERVICE] = str(os.getpid())


def end_with_service() -> None:
    """In a process of the engine, at any depth below the service: exit as soon as the service is gone.

    Without `adopt` before (vLLM started the process on another host), the parent counts as the service.
    """
    try:
        service = os.pidfd_open(int(os.environ.get(_SERVICE, os.getppid())))
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_exit_after, args=(service,), name="tandem-orphan", daemon=True).start()


def _exit_after(process: int) -> None:
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    waiting.poll()
    os._exit(1)
