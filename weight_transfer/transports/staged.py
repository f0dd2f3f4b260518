"""Staged: a trainer on the engine's host writes memory beside the engine's, which serves meanwhile."""

from __future__ import annotations

from weight_transfer.transports.base import SourceTensor
from weight_transfer.transports.shared import SharedTransport


class StagedTransport(SharedTransport):
    """Every tensor is written in each update, and no parameter becomes that memory."""

    def _may_alias(self, source: SourceTensor) -> bool:
        return False
