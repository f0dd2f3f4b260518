"""Trying an update again: with an engine that came back, a lease that was lost, or past a commit of our own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from tandem.errors import Reason, TandemError
from trainer_service.updates import ATTEMPTS, retryable

logger = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A commit that was asked for, and not answered: its number, and the policy's digest where that is known."""

    number: int
    digest: int | None

    def explains(self, error: TandemError) -> bool:
        """Whether this commit may be in an update's way: made after we lost sight of it, or still being made."""
        if error.reason == Reason.BASE_VERSION_MISMATCH:
            return error.metadata.get("weight_version") == str(self.number)
        return error.reason == Reason.LEASE_HELD


def insist(
    attempt: Callable[[], None],
    recover: Callable[[TandemError, float], None],
    asked: Callable[[], Asked | None],
    timeout_s: float,
    after: TandemError | None = None,
) -> None:
    """Make `attempt`, and after `recover` make it again where that may help.

    What a commit of our own explains is not counted as a failure, for as long as there is time.

    Args:
        recover: sees what an error left behind; called with it, and with when all must be done.
        asked: the commit of which nothing was heard, if there is one.
        timeout_s: how long the engine may stay away, in seconds.
        after: the error of an attempt that was made before.

    Raises:
        TandemError: the last attempt's.
    """
    deadline, left, error = time.monotonic() + timeout_s, ATTEMPTS, after
    while True:
        try:
            if error is not None:
                recover(error, deadline)
            return attempt()
        except TandemError as failed:
            commit = asked()
            if commit is None or not commit.explains(failed) or time.monotonic() > deadline:
                left -= 1
                if not left or not retryable(failed):
                    raise
            logger.warning("update failed, trying again: %s", failed)
            error = failed
