"""Whether an update is staged beside the live weights or goes straight into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import structlog

from inference_service.arenas import EngineArenas
from inference_service.memory import HEADROOM, free_bytes
from inference_service.transports import NCCL, SHARED, why_not_in_place
from tandem.errors import FailedPrecondition, Reason

log = structlog.get_logger(__name__)

#: What the service is told to do where a trainer does not say.
UpdateMode = Literal["auto", "staged", "in_place"]


class Modes:
    """Chooses: as the trainer asks, else as the service is set, else by transport and free memory."""

    def __init__(
        self, arenas: EngineArenas, setting: UpdateMode = "auto", free: Callable[[], int] = free_bytes
    ) -> None:
        self._arenas = arenas
        self._setting = setting
        self._free = free

    def for_session(self, transport: str, asked: str = "", *, adapter: bool = False) -> str:
        """What all of a session's updates are: "staged", "in_place", or "" where each begin shall choose.

        Args:
            transport: the session's.
            asked: what its trainer wants, if anything.
            adapter: whether its updates carry an adapter.

        Raises:
            FailedPrecondition: TRANSPORT_UNAVAILABLE, what it asks for cannot be.
        """
        why_not = why_not_in_place(self._arenas, transport, adapter=adapter)
        if why_not:
            if asked == "in_place":
                raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, f"in place: {why_not}")
            return "staged"
        if asked or self._setting != "auto":
            return asked or self._setting
        if transport == NCCL:  # what is free of a GPU that an engine has to itself stays so
            return "staged" if self._arenas.stage_bytes + HEADROOM <= self._arenas.free else "in_place"
        # What a trainer shares, it shares to write itself: no byte moves where it can.
        return "in_place" if transport == SHARED else ""

    def in_place(self, mode: str) -> bool:
        """Whether one update that begins now goes straight into the live weights."""
        if mode:
            return mode == "in_place"
        need, free = self._arenas.manifest.nbytes, self._free()
        if need + HEADROOM <= free:
            return False
        log.info("too little memory to stage an update beside the live weights", need=need, free=free)
        return True
