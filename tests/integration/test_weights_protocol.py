"""The weight service's messages against a real engine: what is refused and how, what tears, what heals."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    ResourceExhausted,
    TandemError,
    Unavailable,
)
from tandem.inference.v1 import inference_pb2
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import oracle, raw
from tests.faults.plane import NOTICED_S, Plane, what_is_held
from tests.services import Service

SHARED, STREAM = raw.SHARED, raw.STREAM
BOTH = pytest.mark.parametrize("transport", [SHARED, STREAM], ids=["shared", "stream"])

Tensors = raw.Tensors


@pytest.fixture(scope="module")
def made(llama: Service, checkpoints: dict[str, Path]) -> Plane:
    return Plane(llama, checkpoints["llama"])


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    """It is left with the checkpoint, committed, without a session."""
    made.start()
    yield made
    if raw.now(made.stub).weight_version != made.version or raw.state(made.stub) == "TORN":
        raw.restore(made.stub)
    made.start()
    made.assert_unchanged()


def reason_of(call: Callable[[], object], kind: type[TandemError]) -> Reason | str:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.reason


# Opening a session.


def test_all_that_is_wrong_with_a_manifest_is_said_at_once(plane: Plane) -> None:
    request = pb.OpenSessionRequest(
        identity=raw.identity(), tensors=[raw.spec_of(*item) for item in plane.tensors.items()]
    )
    specs = {spec.name: spec for spec in request.tensors}
    specs["model.norm.weight"].shape[:] = [129]
    specs["model.embed_tokens.weight"].dtype = pb.DTYPE_INT8
    request.tensors.append(specs["model.layers.0.mlp.up_proj.weight"])
    request.tensors.append(pb.TensorSpec(name="lm_head.weight", dtype=pb.DTYPE_FLOAT32, shape=[259, 128]))
    kept = [spec for spec in request.tensors if spec.name != "model.layers.1.mlp.up_proj.weight"]
    del request.tensors[:]
    request.tensors.extend(kept)
    with pytest.raises(InvalidArgument) as caught, rpc.translated():
        plane.stub.OpenSession(request, timeout=5)
    assert caught.value.reason == Reason.MANIFEST_MISMATCH
    assert {v.field: v.description for v in caught.value.violations} == {
        "tensors[model.norm.weight]": "shape [129] is not the engine's [128]",
        "tensors[model.embed_tokens.weight]": "dtype int8 cannot become the engine's bfloat16",
        "tensors[model.layers.0.mlp.up_proj.weight]": "given 2 times",
        "tensors[model.layers.1.mlp.up_proj.weight]": "missing; the engine has bfloat16[192, 128]",
        "tensors[lm_head.weight]": "unexpected; the engine has no such tensor",
    }
    plane.assert_unchanged()


def test_a_manifest_of_nothing_misses_everything(plane: Plane) -> None:
    with pytest.raises(InvalidArgument) as caught, rpc.translated():
        plane.stub.OpenSession(pb.OpenSessionRequest(identity=raw.identity()), timeout=5)
    assert caught.value.message.startswith(f"{len(plane.names)} tensors are not the engine's")


def test_dtypes_that_are_none_are_named(plane: Plane) -> None:
    request = pb.OpenSessionRequest(
        identity=raw.identity(), tensors=[raw.spec_of(*item) for item in plane.tensors.items()]
    )
    request.tensors[3].dtype = pb.DTYPE_UNSPECIFIED
    request.tensors[5].dtype = 99
    with pytest.raises(InvalidArgument) as caught, rpc.translated():
        plane.stub.OpenSession(request, timeout=5)
    assert caught.value.reason == Reason.FIELD_INVALID
    assert [v.field for v in caught.value.violations] == ["tensors[3].dtype", "tensors[5].dtype"]


@pytest.mark.parametrize(
    ("change", "field"),
    [({"transport": 77}, "transport"), ({"identity": pb.ProcessIdentity()}, "identity.boot_id")],
)
def test_fields_that_are_wrong_are_named(plane: Plane, change: dict[str, object], field: str) -> None:
    tensors = [raw.spec_of(*item) for item in plane.tensors.items()]
    fields = {"identity": raw.identity(), "tensors": tensors} | change
    with pytest.raises(InvalidArgument) as caught, rpc.translated():
        plane.stub.OpenSession(pb.OpenSessionRequest(**fields), timeout=5)
    assert [v.field for v in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"boot_id": "another"}, "the two processes are on different hosts"),
        ({"pid_namespace": 1}, "different PID namespaces"),
        ({"gpu_uuids": ["GPU-1"]}, "the policy is on different devices"),
    ],
    ids=["host", "container", "device"],
)
def test_who_cannot_share_streams_and_is_told_why(plane: Plane, change: dict[str, object], why: str) -> None:
    session = plane.open(**change)
    assert session.answer.transport == STREAM
    assert why in session.answer.reason
    assert not session.answer.HasField("shared")
    with pytest.raises(FailedPrecondition, match=why) as caught:
        plane.open(SHARED, **change)
    assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE
    assert plane.open(STREAM, **change).answer.reason == "", "it was asked for"
    session.update(plane.tensors)
    plane.assert_serves(plane.new, plane.version + 1)


def test_the_fastest_transport_is_taken(plane: Plane) -> None:
    with plane.open() as session:
        assert (session.answer.transport, session.answer.reason) == (SHARED, "")
        assert (
            session.answer.engine_id
            == plane.service.inference.GetModel(inference_pb2.GetModelRequest(), timeout=5).engine_id
        )
        assert session.answer.lease_timeout.ToNanoseconds() == 2e9


def test_a_second_trainer_is_refused_while_one_shares(plane: Plane) -> None:
    with plane.open(SHARED):
        for transport in (0, SHARED, STREAM):
            assert reason_of(lambda t=transport: plane.open(t), Aborted) == Reason.LEASE_HELD  # type: ignore[misc]
    with plane.open(SHARED) as session:  # and may come when the first is gone
        session.update(plane.tensors)


def test_a_second_update_is_refused_while_one_is_open(plane: Plane) -> None:
    first, second = plane.open(STREAM), plane.open(STREAM)
    with first.begin() as update:
        assert reason_of(second.begin, Aborted) == Reason.LEASE_HELD
        assert reason_of(first.begin, Aborted) == Reason.LEASE_HELD
        assert reason_of(lambda: raw.restore(plane.stub), Aborted) == Reason.LEASE_HELD
        update.abort(untouched=True)
    with second.begin() as update:
        update.abort(untouched=True)
    plane.assert_unchanged()


def test_unknown_sessions(plane: Plane) -> None:
    for name in ("nobody", "x" * 5000):
        update = raw.Update(plane.stub)
        update.send(begin=pb.BeginUpdate(session_id=name, base_version=plane.version))
        with pytest.raises(NotFound) as caught:
            update.expect("ready")
        assert caught.value.reason == Reason.SESSION_NOT_FOUND


def test_a_shared_session_without_its_connection_is_none(plane: Plane) -> None:
    session = raw.Session(plane.stub, plane.tensors, SHARED)
    assert reason_of(session.begin, NotFound) == Reason.SESSION_NOT_FOUND, "it never fetched the memory"
    session.attach()
    session.close()
    end = time.monotonic() + 5
    while reason_of(session.begin, TandemError) != Reason.SESSION_NOT_FOUND:
        assert time.monotonic() < end
    plane.assert_unchanged()


# Updates.


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
        assert 1.5 < time.monotonic() - began < NOTICED_S
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
        with session.begin(timeout=1.0 if end == "deadline" else 20.0) as update:
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


# What everybody may see.


def test_versions_and_states_are_watched(plane: Plane) -> None:
    with raw.watching(plane.stub) as one, raw.watching(plane.stub) as two:
        assert next(one) == next(two) == (plane.version, "COMMITTED")
        session = plane.open(STREAM)
        session.update(plane.tensors)
        with plane.open(SHARED) as shared:
            with shared.begin() as update:
                raw.wait_for(one, "WRITING")
                reason_of(lambda: update.abort(untouched=False), Unavailable)
            shared.update(plane.tensors)
        seen = []
        for change in two:
            seen.append(change)
            if change == (plane.version + 2, "COMMITTED"):
                break
    v = plane.version
    assert all(now != before for before, now in itertools.pairwise(seen)), "told twice"
    everything = iter(
        [
            (v, "STAGING"),
            (v, "WRITING"),
            (v + 1, "COMMITTED"),
            (v + 1, "WRITING"),
            (v + 1, "TORN"),
            (v + 1, "WRITING"),
            (v + 2, "COMMITTED"),
        ]
    )
    assert all(change in everything for change in seen), "out of order"
    assert {(v, "STAGING"), (v + 1, "TORN"), (v + 2, "COMMITTED")} <= set(seen)


def test_a_digest_is_never_of_a_mix(plane: Plane) -> None:
    """Asked for while updates come and go, it is one version's, or refused."""
    session = plane.open(SHARED)
    other = oracle.tensors_of(plane.old, plane.names)
    allowed = {plane.version: plane.digest}
    over = threading.Event()
    found: list[tuple[int, int]] = []

    def ask() -> None:
        while not over.is_set():
            with contextlib.suppress(Aborted):
                now = raw.now(plane.stub, digest=True)
                found.append((now.weight_version, now.digest))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with session:
            for step in range(20):
                tensors = plane.tensors if step % 2 == 0 else other
                allowed[plane.version + step + 1] = session.digest(tensors)
                session.update(tensors)
    finally:
        over.set()
        asking.join(10)
    assert found
    assert all(allowed[version] == digest for version, digest in found)


def test_updates_are_counted(plane: Plane) -> None:
    def stats() -> engine_pb2.GetStatsResponse:
        return plane.service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=5)

    before = stats()
    session = plane.open(STREAM)
    session.update(plane.tensors)
    with session.begin() as update:
        update.abort(untouched=True)
    after = stats()
    assert after.updates_committed - before.updates_committed == 1
    assert after.updates_failed - before.updates_failed == 1
    assert 0 < after.last_update_stopped.ToNanoseconds() < 5e9
    assert after.weight_version == plane.version + 1


def test_fifty_sessions_leave_nothing(plane: Plane) -> None:
    with plane.open(SHARED) as session:  # what is made once is made
        session.update(plane.tensors)
    plane.wait_until_alone()
    before = what_is_held(plane.service)
    for n in range(50):
        with plane.open(SHARED) as session:
            with session.begin() as update:
                if n % 2:
                    session.version = update.commit(digest_now(session))
                else:
                    update.abort(untouched=True)
        plane.wait_until_alone()
    assert what_is_held(plane.service) == before


def digest_now(session: raw.Session) -> int:
    """Of what the engine holds: an update that changes nothing."""
    held = {name: placement.gather(session.arenas) for name, placement in session.placements.items()}
    return session.digest(held)


def test_restoring_makes_a_version_that_trainers_must_know_of(plane: Plane) -> None:
    with plane.open(SHARED) as session:
        assert raw.restore(plane.stub) == plane.version + 1
        assert reason_of(session.begin, FailedPrecondition) == Reason.BASE_VERSION_MISMATCH
        session.version += 1
        session.update(plane.tensors)
    plane.assert_serves(plane.new, plane.version + 2)


def test_errors_carry_what_programs_read(plane: Plane) -> None:
    """On the wire: a canonical code, and a reason in ErrorInfo."""
    update = raw.Update(plane.stub)
    update.send(begin=pb.BeginUpdate(session_id="gone", base_version=1))
    with pytest.raises(grpc.RpcError) as caught:
        next(update.call)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    assert rpc.translate(caught.value).metadata == {"session_id": "gone"}
