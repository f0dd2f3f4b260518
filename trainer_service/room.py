"""Memory of a device that a trainer shares with an engine: what the allocator of one keeps, the other cannot have."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import broadcast  # type: ignore[import-untyped]

from trainer_service.reaching import Services


class Room:
    """An engine that sleeps while there is training finds its memory free again when it wakes."""

    def __init__(self, client: Services, accelerator: Any, *, shared: bool) -> None:
        """Of a rank.

        Args:
            client: of the engine.
            accelerator: the rank's.
            shared: whether the engine is on the ranks' devices.
        """
        self._client = client
        self._accelerator = accelerator
        self._shared = shared and accelerator.device.type == "cuda"
        self._freed, self._asleep = 0, False

    def free(self) -> None:
        """Have the engine sleep. Every rank must call it, and none may generate any more."""
        freed, self._asleep = 0, True
        try:
            if self._accelerator.is_main_process:
                freed = self._client.sleep()
        finally:
            if self._shared:
                told = torch.tensor([freed], dtype=torch.int64, device=self._accelerator.device)
                self._freed = max(self._freed, int(broadcast(told, from_process=0)))

    def make(self) -> None:
        """Before the engine wakes: free what torch keeps and does not use, if less is free than it will take again.

        To free it each time would have each step allocate anew.
        """
        wanted = self._freed + self._freed // 4  # beside the cache it takes some to work with
        if self._asleep and wanted and torch.cuda.mem_get_info(self._accelerator.device)[0] < wanted:
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Have the engine wake, in what room there is. One that is awake has its memory, and needs none."""
        self.make()
        self._client.wake_up()
        self._asleep = False
