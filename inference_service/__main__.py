"""`python -m inference_service` and `tandem inference`."""

from __future__ import annotations

import asyncio
import os
import sys

from inference_service.config import InferenceSettings
from tandem.cli import explain, run


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and end the process, also where serving failed: then with the reason and its code.

    Raises:
        TandemError: a setting is wrong.
    """
    settings = InferenceSettings.checked(sys.argv[1:] if argv is None else argv)
    from tandem.logs import set_up_logging
    from tandem.variables import warn_of_unknown

    set_up_logging(json=settings.log_json)
    warn_of_unknown(InferenceSettings)
    from inference_service.server import serve

    code = 0
    try:
        asyncio.run(serve(settings))
    except Exception as error:  # noqa: BLE001  # told here, since nothing is raised out of a process that must end
        code = explain(error, "inference")
    # Threads of vLLM's that do not end would keep the interpreter from doing so.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run("inference", lambda: main, sys.argv[1:]))
