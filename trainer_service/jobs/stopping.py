"""How a training is told to end."""

from __future__ import annotations

#: What the job's output says then.
TOLD = b"told to end: the training stops, and saves, after the step that it is in\n"


class Stopped(BaseException):
    """The process was told to end before it trained."""
