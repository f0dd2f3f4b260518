"""`python -m inference_service` and `tandem inference`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any

import pydantic
import structlog

from inference_service.config import InferenceSettings
from tandem.cli import explain, run
from tandem.errors import InvalidArgument, Reason, Violation


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and end the process, also where serving failed: then with the reason and its code.

    Raises:
        TandemError: a setting is wrong.
    """
    try:
        settings = InferenceSettings.load(sys.argv[1:] if argv is None else argv)
    except pydantic.ValidationError as error:
        violations = [
            Violation(".".join(map(str, e["loc"])) or "settings", e["msg"])
            for e in error.errors(include_url=False)
            if e["type"] != "default_factory_not_called"  # a consequence of another
        ]
        first = violations[0]
        raise InvalidArgument(
            Reason.FIELD_INVALID, f"{first.field}: {first.description}", violations=violations
        ) from None
    set_up_logging(json=settings.log_json)
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


def set_up_logging(*, json: bool) -> None:
    """One line an event, on standard error, for people or machines."""
    # Plain tracebacks in both: the default shows local variables, and those hold prompts.
    renderers: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(run("inference", lambda: main, sys.argv[1:]))
