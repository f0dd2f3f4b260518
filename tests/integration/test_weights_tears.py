"""The weight service's messages against a real engine: what tears it, and what heals it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tandem.engine.v1 import engine_pb2
from tandem.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Reason,
    Unavailable,
)
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import raw
from tests.faults.plane import Plane
from tests.integration.protocol import NOTICED_S, SHARED, STREAM, reason_of


def tear_by_digest(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        session.write(plane.tensors)
        assert reason_of(lambda: update.commit(1), DataLoss) == Reason.DIGEST_MISMATCH
    return "the trainer's weights have digest 0000000000000001"


def tear_by_abort(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        session.write(plane.tensors)
        why = "ZeroDivisionError: division by zero"
        reason = reason_of(lambda: update.abort(untouched=False, reason=why), Unavailable)
        assert reason == Reason.ENGINE_TORN
    return why


def tear_by_silence(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        session.view("model.norm.weight").zero_()
        began = time.monotonic()
        update.silence()
        assert reason_of(lambda: update.expect("committed"), Aborted) == Reason.LEASE_LOST
        assert 1.0 < time.monotonic() - began < NOTICED_S
    return "nothing was heard of the trainer for 2 s"


def tear_by_leaving(plane: Plane, session: raw.Session) -> str:
    with raw.watching(plane.stub) as changes, session.begin() as update:
        session.view("model.norm.weight").zero_()
        update.cancel()
        raw.wait_for(changes, "TORN")
    return "the trainer vanished"


def tear_by_ending_the_stream(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        update.end()
        assert reason_of(lambda: update.expect("committed"), Aborted) == Reason.LEASE_LOST
    return "the trainer ended its update's stream"


def tear_by_a_chunk(plane: Plane, session: raw.Session) -> str:
    """Out of protocol, and nobody knows what it has written by then."""
    with session.begin() as update:
        update.send(chunk=pb.TensorChunk(tensor=0, offset=0, data=b"12"))
        assert reason_of(lambda: update.expect("committed"), FailedPrecondition) == Reason.UPDATE_ORDER
    return "chunks belong to the stream transport"


def tear_by_leaving_out_the_digest(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        session.write(plane.tensors)
        assert reason_of(update.commit, InvalidArgument) == Reason.FIELD_INVALID
    return "commit.digest: required, since bytes moved"


def tear_by_closing_the_session(plane: Plane, session: raw.Session) -> str:
    with session.begin() as update:
        session.view("model.norm.weight").zero_()
        session.close()
        assert reason_of(lambda: update.expect("committed"), Aborted) == Reason.LEASE_LOST
    return f"the trainer (process {os.getpid()}) closed its session or died"


TEARS = [
    tear_by_digest,
    tear_by_abort,
    tear_by_silence,
    tear_by_leaving,
    tear_by_ending_the_stream,
    tear_by_a_chunk,
    tear_by_leaving_out_the_digest,
    tear_by_closing_the_session,
]


@pytest.mark.parametrize("tear", TEARS, ids=lambda f: f.__name__)
def test_a_shared_update_that_breaks_tears_and_a_full_one_heals(
    plane: Plane, tear: Callable[[Plane, raw.Session], str]
) -> None:
    with plane.open(SHARED) as session:
        plane.assert_torn(tear(plane, session))
        healing = session
        if tear is tear_by_closing_the_session:
            healing = plane.open(SHARED)
        with healing:
            assert healing.update(plane.tensors) == plane.version + 1
    plane.assert_serves(plane.new, plane.version + 1)


@pytest.mark.parametrize("heal", ["checkpoint", "stream"])
def test_a_torn_engine_is_healed_by_others_once_the_trainer_is_gone(plane: Plane, heal: str) -> None:
    with plane.open(SHARED) as session:
        plane.assert_torn(tear_by_leaving(plane, session))
        # It lost its lease in the middle of writing, and nobody can keep it from writing on.
        with pytest.raises(Aborted, match="still has the weights' memory") as caught:
            raw.restore(plane.stub)
        assert caught.value.reason == Reason.LEASE_HELD
        assert raw.state(plane.stub) == "TORN"
    if heal == "checkpoint":
        plane.wait_until_alone()
        assert raw.restore(plane.stub) == plane.version + 1
        plane.assert_serves(plane.old, plane.version + 1)
        assert raw.now(plane.stub, digest=True).digest == plane.digest
    else:
        plane.wait_until_alone()
        assert plane.open(STREAM).update(plane.tensors) == plane.version + 1
        plane.assert_serves(plane.new, plane.version + 1)


def test_a_torn_engine_stays_torn_over_updates_that_fail(plane: Plane) -> None:
    with plane.open(SHARED) as session:
        why = tear_by_abort(plane, session)
        with session.begin() as update:
            assert reason_of(lambda: update.abort(untouched=True), Unavailable) == Reason.ENGINE_TORN
        plane.assert_torn(why)
        plane.service.engine.Resume(engine_pb2.ResumeRequest(), timeout=5)
        plane.service.engine.Pause(engine_pb2.PauseRequest(), timeout=5)
        plane.service.engine.Resume(engine_pb2.ResumeRequest(), timeout=5)
        plane.assert_torn(why)
    plane.wait_until_alone()
    session = plane.open(STREAM)
    with session.begin() as update:
        for chunk in session.chunks(plane.tensors):
            update.send(chunk=chunk)
        assert reason_of(lambda: update.commit(1), DataLoss) == Reason.DIGEST_MISMATCH
    plane.assert_torn(why)


def test_an_untouched_shared_update_can_be_given_up(plane: Plane) -> None:
    with plane.open(SHARED) as session:
        with session.begin() as update:
            update.abort(untouched=True, reason="changed my mind")
        plane.assert_unchanged()
