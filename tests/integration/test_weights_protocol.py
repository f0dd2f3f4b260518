"""The weight service's messages against a real engine: which of an update are refused, and how."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tandem.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    TandemError,
)
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import oracle, raw
from tests.faults.plane import Plane
from tests.integration.protocol import BOTH, NOTICED_S, SHARED, STREAM, Tensors, reason_of


@BOTH
def test_a_wrong_base_version(plane: Plane, transport: int) -> None:
    with plane.open(transport) as session:
        for base in (plane.version - 1, plane.version + 1):
            assert (
                reason_of(lambda b=base: session.begin(b), FailedPrecondition) == Reason.BASE_VERSION_MISMATCH
            )  # type: ignore[misc]
    plane.assert_unchanged()


def test_a_wrong_digest_of_a_stream_changes_nothing(plane: Plane) -> None:
    session = plane.open(STREAM)
    with session.begin() as update:
        for chunk in session.chunks(plane.tensors):
            update.send(chunk=chunk)
        with pytest.raises(DataLoss) as caught:
            update.commit(session.digest(plane.tensors) ^ 1)
    assert caught.value.reason == Reason.DIGEST_MISMATCH
    assert int(caught.value.metadata["trainer"], 16) ^ 1 == int(caught.value.metadata["engine"], 16)
    plane.assert_unchanged()
    session.update(plane.tensors)
    plane.assert_serves(plane.new, plane.version + 1)


def test_one_flipped_bit_in_a_stream_is_found(plane: Plane) -> None:
    session = plane.open(STREAM)
    with session.begin() as update:
        for n, chunk in enumerate(session.chunks(plane.tensors)):
            if n == 7:
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            update.send(chunk=chunk)
        assert (
            reason_of(lambda: update.commit(session.digest(plane.tensors)), DataLoss)
            == Reason.DIGEST_MISMATCH
        )
    plane.assert_unchanged()


Steps = Callable[[raw.Session, raw.Update, Tensors], None]


def chunk(tensor: int = 0, offset: int = 0, data: bytes = b"12") -> Steps:
    return lambda session, update, tensors: update.send(
        chunk=pb.TensorChunk(tensor=tensor, offset=offset, data=data)
    )


def commit_with_nothing(session: raw.Session, update: raw.Update, tensors: Tensors) -> None:
    update.send(commit=pb.CommitUpdate(digest=1))


def commit_without_a_digest(session: raw.Session, update: raw.Update, tensors: Tensors) -> None:
    for one in session.chunks(tensors):
        update.send(chunk=one)
    update.send(commit=pb.CommitUpdate())


def the_same_chunk_twice(session: raw.Session, update: raw.Update, tensors: Tensors) -> None:
    for _ in range(2):
        chunk()(session, update, tensors)


def begin_again(session: raw.Session, update: raw.Update, tensors: Tensors) -> None:
    update.send(begin=pb.BeginUpdate(session_id=session.id, base_version=session.version))


WRONG_STEPS = {
    "not its first byte": (chunk(offset=2), FailedPrecondition, Reason.UPDATE_ORDER, "byte 0 is next"),
    "no such tensor": (chunk(tensor=1000), InvalidArgument, Reason.FIELD_INVALID, "has 20 tensors, not 1001"),
    "more than the tensor": (
        chunk(tensor=1, data=b"x" * 300),
        InvalidArgument,
        Reason.FIELD_INVALID,
        "has 256 bytes, not 300",
    ),
    "too large": (
        chunk(data=b"x" * ((1 << 20) + 1)),
        ResourceExhausted,
        Reason.MESSAGE_TOO_LARGE,
        "1048577 bytes, the session's limit is 1048576",
    ),
    "twice": (the_same_chunk_twice, FailedPrecondition, Reason.UPDATE_ORDER, "but byte 2 is next"),
    "begin again": (begin_again, FailedPrecondition, Reason.UPDATE_ORDER, "begin after begin"),
    "an empty step": (
        lambda session, update, tensors: update.send(),
        FailedPrecondition,
        Reason.UPDATE_ORDER,
        "an empty step after begin",
    ),
    "bytes missing": (
        commit_with_nothing,
        FailedPrecondition,
        Reason.UPDATE_ORDER,
        "20 tensors are incomplete",
    ),
    "no digest": (
        commit_without_a_digest,
        InvalidArgument,
        Reason.FIELD_INVALID,
        "commit.digest: required",
    ),
}


@pytest.mark.parametrize(("steps", "kind", "reason", "text"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_steps_that_a_stream_does_not_take(
    plane: Plane, steps: Steps, kind: type[TandemError], reason: Reason, text: str
) -> None:
    session = plane.open(STREAM)
    with session.begin() as update:
        steps(session, update, plane.tensors)
        with pytest.raises(kind, match=text) as caught:
            update.expect("committed")
    assert caught.value.reason == reason
    if text.endswith("incomplete"):
        assert {v.field for v in caught.value.violations} <= {*plane.names, "..."}
    plane.assert_unchanged()
    with session.begin() as update:  # and the lease is free
        update.abort(untouched=True)


def test_a_message_over_grpcs_limit(plane: Plane) -> None:
    session = plane.open(STREAM)
    with session.begin() as update:
        update.send(chunk=pb.TensorChunk(data=b"x" * (17 << 20)))
        reason = reason_of(lambda: update.expect("committed"), ResourceExhausted)
        assert reason == Reason.MESSAGE_TOO_LARGE
    plane.assert_unchanged()


@pytest.mark.parametrize(
    "first",
    [
        {"heartbeat": pb.Heartbeat()},
        {"chunk": pb.TensorChunk(data=b"1")},
        {"commit": pb.CommitUpdate(digest=1)},
        {"abort": pb.AbortUpdate(untouched=True)},
        {"begin": pb.BeginUpdate()},
        {},
    ],
    ids=["heartbeat", "chunk", "commit", "abort", "begin without a session", "nothing"],
)
def test_an_update_starts_with_begin(plane: Plane, first: dict[str, object]) -> None:
    with raw.Update(plane.stub) as update:
        update.send(**first)
        with pytest.raises(FailedPrecondition, match="starts with begin") as caught:
            update.expect("ready")
    assert caught.value.reason == Reason.UPDATE_ORDER
    plane.assert_unchanged()


def test_a_stream_that_ends_before_it_began(plane: Plane) -> None:
    with raw.Update(plane.stub) as update:
        update.end()
        assert reason_of(lambda: update.expect("ready"), Aborted) == Reason.LEASE_LOST


def commit(session: raw.Session, update: raw.Update, tensors: Tensors) -> int:
    for chunk in session.chunks(tensors):
        update.send(chunk=chunk)
    return update.commit(session.digest(tensors))


def test_one_update_after_the_other_in_a_stream_that_holds_nothing_in_between(plane: Plane) -> None:
    session = plane.open(STREAM)
    with session.begin(keep_stream=True) as update:
        assert commit(session, update, plane.tensors) == plane.version + 1
        update.send(heartbeat=pb.Heartbeat())  # one that was late
        update.silence()
        time.sleep(1.5 * NOTICED_S)
        assert raw.state(plane.stub) == "COMMITTED"
        with session.begin(plane.version + 1) as another:  # the lease is free
            another.abort(untouched=True)
        update.send(begin=pb.BeginUpdate(session_id=session.id, base_version=plane.version + 1))
        update.expect("ready")
        assert commit(session, update, plane.tensors) == plane.version + 2
        assert list(update.call) == [], "this one did not want it kept: the service ends it"
    plane.assert_serves(plane.new, plane.version + 2)


@pytest.mark.parametrize("end", ["trainer", "abort"])
def test_a_stream_that_is_kept_ends_with_the_trainer_or_an_abort(plane: Plane, end: str) -> None:
    session = plane.open(STREAM)
    with session.begin(keep_stream=True) as update:
        if end == "abort":
            update.abort(untouched=True)
        else:
            commit(session, update, plane.tensors)
            update.end()
        assert list(update.call) == [], "which is no error"


@pytest.mark.parametrize("wrong", ["base", "step"])
def test_a_later_update_that_is_refused_ends_the_stream(plane: Plane, wrong: str) -> None:
    session = plane.open(STREAM)
    with session.begin(keep_stream=True) as update:
        version = commit(session, update, plane.tensors)
        if wrong == "base":
            update.send(begin=pb.BeginUpdate(session_id=session.id, base_version=version - 1))
            reason = reason_of(lambda: update.expect("ready"), FailedPrecondition)
            assert reason == Reason.BASE_VERSION_MISMATCH
        else:
            update.send(commit=pb.CommitUpdate(digest=1))
            with pytest.raises(FailedPrecondition, match="starts with begin"):
                update.expect("ready")
    plane.assert_serves(plane.new, version)


def test_a_pause_mode_that_is_none(plane: Plane) -> None:
    session = plane.open(STREAM)
    with pytest.raises(InvalidArgument) as caught:
        session.begin(in_flight=9)
    assert [v.field for v in caught.value.violations] == ["begin.in_flight"]
    plane.assert_unchanged()


@pytest.mark.parametrize("end", ["silence", "cancel", "end", "deadline"])
def test_a_staged_update_that_breaks_is_dropped(plane: Plane, end: str) -> None:
    session = plane.open(STREAM)
    with raw.watching(plane.stub) as changes:
        with session.begin(timeout=3.0 if end == "deadline" else 20.0) as update:
            for one in list(session.chunks(plane.tensors))[:9]:
                update.send(chunk=one)
            raw.wait_for(changes, "STAGING")
            assert oracle.difference(plane.scores, oracle.scores(plane.service)) == 0, "it serves meanwhile"
            began = time.monotonic()
            if end == "silence":
                update.silence()
                assert reason_of(lambda: update.expect("committed"), Aborted) == Reason.LEASE_LOST
                assert time.monotonic() - began < NOTICED_S
            elif end == "deadline":
                assert reason_of(lambda: update.expect("committed"), TandemError) == Reason.DEADLINE
            else:
                getattr(update, end)()
            raw.wait_for(changes, "COMMITTED")
    plane.assert_unchanged()
    session.update(plane.tensors)
    plane.assert_serves(plane.new, plane.version + 1)


def test_heartbeats_keep_an_update_open(plane: Plane) -> None:
    """For longer than the lease's two seconds."""
    with plane.open(SHARED) as session, session.begin() as update:
        session.write(plane.tensors)
        done = threading.Event()
        assert not done.wait(3.0)
        assert update.commit(session.digest(plane.tensors)) == plane.version + 1
    plane.assert_serves(plane.new, plane.version + 1)


def test_a_trickle_of_chunks_is_a_sign_of_life(plane: Plane) -> None:
    session = plane.open(STREAM)
    with session.begin() as update:
        update.silence()
        pause = threading.Event()
        for n, one in enumerate(session.chunks(plane.tensors)):
            if n in (3, 6, 9):
                pause.wait(1.0)
            update.send(chunk=one)
        assert update.commit(session.digest(plane.tensors)) == plane.version + 1
