"""How much all calls together may ask of the service. Knows nothing of gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tandem.errors import Reason, ResourceExhausted, invalid

#: Rollouts take seconds: a caller that comes back sooner is refused again.
_RETRY_S = 5.0


class Place:
    """What one call has of the room."""

    def __init__(self, count: int) -> None:
        self.left = count


class Room:
    """Room for `limit` rollouts and sequences. Each costs memory and turns of the event loop even while it waits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls: set[Place] = set()

    @property
    def taken(self) -> int:
        """Rollouts and sequences that wait or run."""
        return sum(place.left for place in self._calls)

    def check(self, count: int, field: str) -> None:
        """Refuse more than there ever is room for. Raises InvalidArgument, naming `field`."""
        if count > self._limit:
            raise invalid(field, f"{count} at once, the service's max_rollouts is {self._limit}")

    @contextmanager
    def take(self, count: int, field: str) -> Iterator[Place]:
        """Have room for `count` until the call ends; what it takes off its place's `left` is free before.

        Raises:
            InvalidArgument: as `check`.
            ResourceExhausted: QUEUE_FULL, other calls have the room.
        """
        self.check(count, field)
        if (taken := self.taken) + count > self._limit:
            raise ResourceExhausted(
                Reason.QUEUE_FULL,
                f"{field}: {count} do not fit beside the {taken} that wait or run: max_rollouts is {self._limit}",
                retry_after=_RETRY_S,
                metadata={"taken": str(taken), "max_rollouts": str(self._limit)},
            )
        place = Place(count)
        self._calls.add(place)
        try:
            yield place
        finally:
            self._calls.discard(place)
