"""An adapter's tensors, which come by stream and are staged; every worker takes them, and then exchanges them."""

from __future__ import annotations

import asyncio

from inference_service.staging import Staging
from inference_service.trained import TrainedAdapter
from inference_service.transports.base import Incoming, compare


class AdapterStream(Incoming):
    """The engine's own weights are never written."""

    of_policy = False
    reloads = False

    def __init__(self, adapter: TrainedAdapter) -> None:
        self._adapter = adapter
        self._staging = Staging(adapter.manifest)
        self._digest = 0
        self._installed = False

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        self._staging.add(tensor, offset, data)

    async def check(self, digest: int | None) -> None:
        self._staging.complete()
        self._digest = await asyncio.to_thread(self._staging.digest)
        compare(digest, self._digest)
        await self._adapter.prepare(self._staging)

    async def install(self) -> None:
        await self._adapter.swap(self._digest)
        self._installed = True

    async def undo(self) -> bool:
        return not self._installed and await self._adapter.revert()

    def release(self) -> None:
        """What is staged takes longer."""

    async def give_back(self) -> None:
        await asyncio.to_thread(self._staging.forget)
        self._staging.release()
