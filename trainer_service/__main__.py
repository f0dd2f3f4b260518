"""`python -m trainer_service` and `tandem trainer`."""

from __future__ import annotations

import asyncio
import sys

from tandem.cli import run
from trainer_service.config import TrainerSettings


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Jobs that run go on.

    Raises:
        TandemError: a setting is wrong, or another service is in the way.
    """
    settings = TrainerSettings.checked(sys.argv[1:] if argv is None else argv)
    from tandem.logs import set_up_logging
    from tandem.variables import warn_of_unknown

    set_up_logging(json=settings.log_json)
    warn_of_unknown(TrainerSettings)
    from trainer_service.server import serve

    asyncio.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(run("trainer", lambda: main, sys.argv[1:]))
