"""The weight service's messages against a real engine: who may open a session, and what everybody may see."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import grpc
import pytest

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Reason,
    TandemError,
    Unavailable,
)
from tandem.inference.v1 import inference_pb2
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import oracle, raw
from tests.faults.plane import Plane, what_is_held
from tests.integration.protocol import SHARED, STREAM, digest_now, reason_of


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
