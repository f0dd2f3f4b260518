"""`python -m trainer_service.rewards module:function --address unix:///path`: a reward function as a service."""

from __future__ import annotations

import asyncio
import os
import re
import sys

from tandem.cli import explain, run
from tandem.logs import set_up_logging
from tandem.variables import warn_of_unknown
from trainer_service.rewards.config import RewardSettings


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and end the process, also where serving failed: then with the reason and its code.

    Raises:
        TandemError: a setting is wrong, or there is no such function.
    """
    given = sys.argv[1:] if argv is None else argv
    # There is mostly one.
    settings = RewardSettings.checked([re.sub("^--address(?==|$)", "--addresses", flag) for flag in given])
    set_up_logging(json=settings.log_json)
    warn_of_unknown(RewardSettings)
    from trainer_service.rewards import server
    from trainer_service.rewards.named import function

    found = function(settings.function, field="function")
    code = 0
    try:
        asyncio.run(server.run(found, settings.serving_config(), workers=settings.workers))
    except Exception as error:  # noqa: BLE001  # told here, since nothing is raised out of a process that must end
        code = explain(error, "rewards")
    # A function that does not return would keep the interpreter from ending.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run("rewards", lambda: main, sys.argv[1:]))
