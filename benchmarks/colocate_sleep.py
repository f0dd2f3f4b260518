"""What an engine gives back while it sleeps, and how long it takes to wake."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.colocate_peers import used
from benchmarks.measure import percentiles
from tandem.engine.v1 import engine_pb2 as pb
from tests.services import Service
from trainer_service.weights import PolicyWeights

_ROUNDS = 5
_TIMEOUT_S = 120


def sleeps(
    service: Service,
    weights: PolicyWeights,
    step: Callable[[], Any],
    generate: Callable[[], Any],
    same: Callable[[], None],
) -> dict[str, Any]:
    """Milliseconds of Sleep, of WakeUp, and of an update in between; bytes of the device that are free meanwhile.

    The weights stay where they are: none is moved again, and `same` sees that the engine has the update's bits.

    Args:
        service: its engine has sleep mode.
        weights: aliased.
        step: of the optimizer.
        generate: a few rollouts, once the engine is awake.
        same: raises where engine and trainer differ.
    """
    asleep, awake, freed, kept = [], [], [], []
    updates = []
    for _ in range(_ROUNDS):
        before = used()
        asleep.append(_ms(lambda: service.engine.Sleep(pb.SleepRequest(), timeout=_TIMEOUT_S)))
        freed.append(before - used())
        step()
        updates.append(weights.history[-1])
        awake.append(_ms(lambda: service.engine.WakeUp(pb.WakeUpRequest(), timeout=_TIMEOUT_S)))
        kept.append(used() - before)
        generate()
        same()
    return {
        "sleep_ms": percentiles(asleep),
        "wake_ms": percentiles(awake),
        "freed_bytes": min(freed),
        "more_after_waking_bytes": max(kept),
        "update_ms": percentiles([update.seconds * 1e3 for update in updates]),
        "update_bytes": max(update.nbytes for update in updates),
    }


def _ms(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
