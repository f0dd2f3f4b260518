"""The engine's processes end with the service, however it ends: left behind, they would hold the weights' memory.

In each process that multiprocessing spawns below the service, this module is what is imported first. A worker's own
module sees to workers that vLLM started by other means.
"""

from __future__ import annotations

import importlib.util
import os
import select
import sys
import threading
import time

_SERVICE = "TANDEM_SERVICE_PID"


def adopt() -> None:
    """In the service, before it starts anything: see to it that what is started ends with this process."""
    os.environ[_SERVICE] = str(os.getpid())
    # By this name multiprocessing has its children import the main module, and those their children.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(__name__)


def end_with_service() -> None:
    """Exit as soon as the service is gone; or the parent, where no service on this host has started us."""
    service = int(os.environ.get(_SERVICE, os.getppid()))
    threading.Thread(target=_exit_after, args=(service,), name="tandem-orphan", daemon=True).start()


def _exit_after(process: int) -> None:
    try:
        waiting = select.poll()
        waiting.register(os.pidfd_open(process), select.POLLIN)
        waiting.poll()
    except ProcessLookupError:
        pass  # it is gone
    except OSError:  # an old kernel, or a container that forbids the call
        while os.path.exists(f"/proc/{process}"):
            time.sleep(0.5)
    os._exit(1)


if __name__ == "__mp_main__":
    end_with_service()
