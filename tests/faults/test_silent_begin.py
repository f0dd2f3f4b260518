"""A trainer that begins and then says nothing holds nobody up, however long the engine takes to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tandem.errors import Aborted, InvalidArgument, Reason
from tests.faults import raw
from tests.faults.raw import IN_PLACE, STREAM
from tests.weight_service import WeightService, network, stopping_late
from trainer_service.client import InferenceClient

LEASE_S = 1.0
NOTICED_S = LEASE_S + 2.0
HANGS_S = 12.0


def stops_late(model: nn.Module) -> Any:
    """The first time it is stopped it stands before a long rollout."""
    return stopping_late(model, 1, HANGS_S)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[InferenceClient]:
    service = WeightService(f"unix://{tmp_path}/s", LEASE_S, network, stops_late)
    service.start()
    with closing(InferenceClient(service.address)) as client:
        client.wait_until_serving(20)
        yield client
    service.kill()


def test_the_lease_of_one_that_is_silent_is_free(client: InferenceClient) -> None:
    tensors = dict(network().named_parameters())
    with raw.Session(client.weights, tensors, STREAM, IN_PLACE) as session:  # type: ignore[arg-type]
        began = time.monotonic()
        with raw.Update(client.weights) as update:
            update.send(begin=session.beginning())
            update.silence()
            with pytest.raises(Aborted) as lost:
                update.expect("ready")
        assert lost.value.reason == Reason.LEASE_LOST
        assert LEASE_S / 2 < time.monotonic() - began < NOTICED_S
        assert raw.state(client.weights) == "COMMITTED"
        with session.begin() as other:  # is ready
            other.abort(untouched=True)


def test_a_number_behind_which_there_is_none_is_refused(client: InferenceClient) -> None:
    tensors = dict(network().named_parameters())
    with raw.Session(client.weights, tensors, STREAM, IN_PLACE) as session:  # type: ignore[arg-type]
        with raw.Update(client.weights) as update:
            update.send(begin=session.beginning(new_version=2**63 - 1))
            with pytest.raises(InvalidArgument, match=r"begin\.new_version"):
                update.expect("ready")
