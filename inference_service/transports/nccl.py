"""NCCL: the engine's worker receives, into the live weights or beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inference_service.link import Link
from inference_service.transports.base import Incoming, compare
from tandem.errors import Aborted, Reason, TandemError, invalid

ID_BYTES = 128


@dataclass(frozen=True)
class Invitation:
    """To one update by NCCL.

    id: of the communicator to join, b"" to stay in the session's last one. window: bytes of a window. broken: told the
    reason where it breaks off.
    """

    link: Link
    session: str
    id: bytes
    window: int
    broken: Callable[[str], None]

    def __post_init__(self) -> None:
        if self.id and len(self.id) != ID_BYTES:
            raise invalid("begin.nccl_id", f"must have {ID_BYTES} bytes, has {len(self.id)}")


class OverNccl(Incoming):
    """In place, the trainer knows alone whether it began to send before it gave up."""

    def __init__(self, invitation: Invitation, *, in_place: bool, partial: bool) -> None:
        self._invitation = invitation
        self._link = invitation.link
        self._staged = not in_place
        self._order = "changes" if partial else "receive"
        self._opened = self._installed = False
        self._received: asyncio.Task[dict[str, Any]] | None = None

    async def open(self) -> None:
        link, asked = self._link, self._invitation
        await link.open()
        if not asked.id and link.joined != asked.session:
            raise Aborted(
                Reason.LEASE_LOST, "the session's communicator was given up; begin with a new nccl_id"
            )
        self._opened = True
        if not asked.id:
            return
        link.joined = ""
        await link.answered(link.order("join", id=asked.id.hex(), **self._how()))
        link.joined = asked.session

    def expect(self) -> None:
        answer = self._link.order(self._order, **self._how())
        self._received = asyncio.ensure_future(self._link.answered(answer))
        self._received.add_done_callback(self._tell)

    def _how(self) -> dict[str, Any]:
        return {"staged": self._staged, "window": self._invitation.window}

    def _tell(self, received: asyncio.Task[dict[str, Any]]) -> None:
        if not received.cancelled() and (error := received.exception()) is not None:
            self._invitation.broken(error.message if isinstance(error, TandemError) else str(error))

    @property
    def coming(self) -> bool:
        return self._received is not None and not self._received.done()

    async def arrived(self) -> None:
        if self._received is not None:
            await asyncio.wait({self._received})

    async def check(self, digest: int | None) -> None:
        if self._received is None:
            raise AssertionError("nothing was expected")
        found = await asyncio.shield(self._received)
        compare(digest, int(found["digest"], 16))

    async def install(self) -> None:
        if self._staged:
            await self._link.answered(self._link.order("install"))
            self._installed = True

    def release(self) -> None:
        received = self._received
        whole = (
            received is not None and received.done() and not received.cancelled() and not received.exception()
        )
        if self._opened and not whole:
            self._link.abort()
        elif whole and self._staged and not self._installed:
            self._link.drop()
        if received is not None:
            received.cancel()
