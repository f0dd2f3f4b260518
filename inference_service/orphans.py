"""The engine's processes end with the service, however it ends: left behind, they would hold the weights' memory.

In each process that multiprocessing spawns below the service, this module is what is imported first.
"""

from __future__ import annotations

import importlib.util
import os
import select
import sys
import threading

_SERVICE = "TANDEM_SERVICE_PID"


def adopt() -> None:
    """In the service, before it starts anything: see to it that what is started ends with this process."""
    os.environ[_SERVICE] = str(os.getpid())
    # By this name multiprocessing has its children import the main module, and those their children.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(__name__)


def end_with_service() -> None:
    """Exit as soon as the service is gone."""
    try:
        service = os.pidfd_open(int(os.environ[_SERVICE]))
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=_exit_after, args=(service,), name="tandem-orphan", daemon=True).start()


def _exit_after(process: int) -> None:
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    waiting.poll()
    os._exit(1)


if __name__ == "__mp_main__":
    end_with_service()
