"""A trainer that goes away at any moment leaves nobody's lease behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from inference_service.policy import Policy
from inference_service.servicers.trainer import Trainer
from inference_service.servicers.weights import _lost
from inference_service.transports import Way
from tandem.weights.v1 import weights_pb2 as pb
from tests.weight_service import idle, network


async def silent() -> AsyncIterator[pb.UpdateWeightsRequest]:
    await asyncio.sleep(100)
    yield pb.UpdateWeightsRequest()


@pytest.mark.parametrize("begun", [False, True], ids=["as it begins", "as it has begun"])
async def test_a_call_that_is_cancelled_gives_its_lease_back(begun: bool) -> None:
    """Also where nobody has seen yet that the update began."""
    engine, arenas = idle(network())
    policy: Any = Policy(engine, arenas)  # type: ignore[arg-type]
    halt, may = engine.halt, asyncio.Event()

    async def halts(*args: Any, **named: Any) -> Any:
        await may.wait()
        return await halt(*args, **named)

    engine.halt = halts  # type: ignore[method-assign]
    trainer = Trainer(silent(), 5.0)
    beginning = trainer.heard_during(policy.begin(1, Way("stream", in_place=True)), _lost)
    call = asyncio.ensure_future(beginning)
    await asyncio.sleep(0.01)
    if begun:
        may.set()
        async with asyncio.timeout(5):
            while policy.state != "WRITING":  # noqa: ASYNC110  # the very next moment is wanted
                await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    may.set()
    assert (policy.state, engine.holders) == ("COMMITTED", set())
    again = await policy.begin(1, Way("stream", in_place=True))
    await again.lose("that is all")
    trainer.close()
