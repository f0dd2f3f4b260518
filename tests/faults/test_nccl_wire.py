"""The wire of a trainer that brings its updates by NCCL: cut, dead or slow, in the middle of one, without a GPU.

What NCCL carries does not take this wire: it may all be there when the messages are not.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import Reason, TandemError, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults.proxy import Proxy
from tests.host_nccl import write
from tests.over_nccl import BUSY, LEASE_S, MODES, client, holds, now, service, trainers
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease

__all__ = ["client", "service"]  # fixtures

#: Seconds until both sides know.
NOTICED_S = LEASE_S + 2


@MODES
@pytest.mark.parametrize("how", ["cut", "dead"])
def test_a_wire_that_breaks_leaves_the_old_version_or_nothing(
    service: WeightService,
    client: InferenceClient,
    socket_folder: Path,
    mode: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When all is on its way, and the commit is not. It is tried again over a wire that works."""
    broke: list[float] = []
    found: list[tuple[int, int]] = []
    send = Lease.send
    with (
        Proxy(f"{socket_folder}/front.sock", service.address.removeprefix("unix://")) as wire,
        closing(InferenceClient(wire.address)) as far,
        trainers(far) as make,
    ):
        model, weights = make(mode)
        weights.sync()
        before, recover = now(client).weight_version, weights._recover

        def breaks(lease: Lease, piece: Any) -> None:
            if not broke:
                wire.cut() if how == "cut" else wire.swallow()
                broke.append(time.monotonic())
            send(lease, piece)

        def recovers(*arguments: Any) -> None:
            assert time.monotonic() - broke[0] < NOTICED_S
            while (after := now(client)).state in BUSY:
                assert time.monotonic() - broke[0] < NOTICED_S
                time.sleep(0.02)
            found.append((after.weight_version, after.state))
            wire.carry_on()
            recover(*arguments)

        monkeypatch.setattr(weights, "_recover", recovers)
        monkeypatch.setattr(Lease, "send", breaks)
        write(model, 3)
        weights.sync()
        torn = mode == "in_place"
        state = pb.WEIGHT_STATE_TORN if torn else pb.WEIGHT_STATE_COMMITTED
        assert found == [(before, state)]
        assert holds(client, weights)


@MODES
def test_a_commit_that_breaks_off_costs_one_attempt(
    client: InferenceClient, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service has given up the communicator: the next begin comes with another."""
    with trainers(client) as make:
        model, weights = make(mode)
        weights.sync()
        tried: list[str] = []
        commit, send, recover = Lease.commit, Lease.send, weights._recover

        def breaks(lease: Lease, *_: Any, **named: Any) -> Any:
            monkeypatch.setattr(Lease, "commit", commit)
            monkeypatch.setattr(Lease, "send", send)
            named["meanwhile"]()
            lease._end()
            raise Unavailable(Reason.UNREACHABLE, "it broke off")

        def recovers(error: TandemError, deadline: float) -> None:
            tried.append(error.message)
            recover(error, deadline)

        monkeypatch.setattr(
            Lease, "send", lambda lease, piece: None
        )  # it is not asked for ahead of the last bytes
        monkeypatch.setattr(Lease, "commit", breaks)
        monkeypatch.setattr(weights, "_recover", recovers)
        write(model, 3)
        weights.sync()
        assert tried == ["it broke off"]
        assert holds(client, weights)


@MODES
def test_a_slow_wire_is_only_slow(
    service: WeightService,
    client: InferenceClient,
    socket_folder: Path,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No update is tried twice for that."""
    back = service.address.removeprefix("unix://")
    with (
        Proxy(f"{socket_folder}/slow.sock", back, delay_s=0.1) as wire,
        closing(InferenceClient(wire.address)) as far,
        trainers(far) as make,
    ):
        model, weights = make(mode)
        monkeypatch.setattr(weights, "_recover", lambda error, deadline: pytest.fail(error.message))
        for seed in range(3):
            write(model, seed)
            weights.sync()
            assert holds(client, weights)
