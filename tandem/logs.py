"""Log lines of the services: one for each event, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


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
