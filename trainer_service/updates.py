"""What updates of one engine and of several have in common: their figures, and what may be tried again."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tandem.errors import Aborted, DeadlineExceeded, FailedPrecondition, Reason, TandemError
from trainer_service.client import is_gone
from weight_transfer.transports import TransportError

#: How long a session or lease of a trainer that just died, perhaps ourselves, may still seem to be held.
HELD_S = 5.0
ATTEMPTS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class UpdateStats:
    """One committed update.

    nbytes: moved, as they travel. seconds: spent on it here. stopped: seconds for which generation stood still, the
    longest of several engines'. changed: elements that it brought anew, where these alone were looked for. ready: of
    `seconds`, those until the service let us write. committed: and those from when all
    was moved until the service said that it is committed.
    """

    weight_version: int
    nbytes: int
    seconds: float
    stopped: float
    changed: int | None = None
    ready: float = 0.0
    committed: float = 0.0


def at_exit(abandon: Callable[[str], None]) -> None:
    """Have an object's method called when the process ends, with the reason, if the object is still there then."""
    method = weakref.WeakMethod(abandon)

    def end() -> None:
        if (call := method()) is not None:
            call("the trainer's process ends")

    atexit.register(end)


def patiently(call: Callable[[], T]) -> T:
    """Call, and again for a while where another trainer has the lease: it may be our own last life."""
    deadline = time.monotonic() + HELD_S
    while True:
        try:
            return call()
        except Aborted as error:
            if error.reason != Reason.LEASE_HELD or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def retryable(error: TandemError) -> bool:
    """Whether the update may succeed when everything is sent again."""
    return is_gone(error) or isinstance(error, DeadlineExceeded) or error.reason == Reason.LEASE_LOST


def broken_off(error: TransportError) -> Aborted:
    """The error where the way to the engine broke off: the update may be tried again."""
    return Aborted(Reason.LEASE_LOST, str(error))


def unleased() -> FailedPrecondition:
    """The error of parameters in the engine's memory that changed while the trainer had no lease."""
    return FailedPrecondition(
        Reason.UPDATE_ORDER,
        "The policy's parameters are the engine's memory, and were written outside an update: by an "
        "optimizer that has parameters or buffers of its own, or by code that belongs in `update()`. An "
        "optimizer like that works with the stream transport.",
    )


def taken(ours: int, theirs: int) -> FailedPrecondition:
    """The error where somebody else made a version."""
    return FailedPrecondition(
        Reason.BASE_VERSION_MISMATCH,
        f"The engine's weights are of version {theirs}, which somebody else made: ours is {ours}. "
        "Where they share memory the trainer's parameters changed as well: resume from a checkpoint.",
        metadata={"base_version": str(ours), "weight_version": str(theirs)},
    )
