"""Whether updates by NCCL may bring what changed alone: of one worker's memory, in which tensors lie in ranges."""

from __future__ import annotations

import os

import pytest
import structlog

from inference_service.arenas import Handle
from inference_service.device_arenas import DeviceArenas
from inference_service.session import Session
from inference_service.sessions import Sessions
from inference_service.transports import NCCL, STREAM
from tandem.errors import InvalidArgument
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement

RANGES = [Block(0, 0, (1,), 0, (1,), (8,)), Block(0, 64, (1,), 8, (1,), (8,))]
WITHIN_A_WORD = [Block(0, 0, (1,), 0, (1,), (6,)), Block(0, 64, (1,), 6, (1,), (10,))]


@pytest.mark.parametrize(
    ("blocks", "ranks", "transport", "takes"),
    [
        (RANGES, [0], NCCL, True),
        (RANGES, [0, 0], NCCL, True),
        (RANGES, [0, 1], NCCL, False),
        (WITHIN_A_WORD, [0], NCCL, False),
        (RANGES, [0], STREAM, False),
    ],
)
def test_changes_alone_are_for_one_worker_and_tensors_in_ranges(
    blocks: list[Block], ranks: list[int], transport: str, takes: bool
) -> None:
    handles = [Handle(os.open(os.devnull, os.O_RDONLY), 4096, f"GPU-{rank}", rank) for rank in ranks]
    placement = Placement(TensorSpec("w", "bfloat16", (16,)), tuple(blocks))
    arenas = DeviceArenas(None, handles, [placement], nccl=22800, free=1 << 40)  # type: ignore[arg-type]
    sessions = Sessions(arenas)
    session = Session("s", transport, "", (placement.spec,), mode="staged")
    with structlog.testing.capture_logs():
        assert sessions.takes_changes(session) is takes
        if takes:
            assert sessions.way(session, partial=True).partial
        else:
            with pytest.raises(InvalidArgument, match="partial"):
                sessions.way(session, partial=True)
