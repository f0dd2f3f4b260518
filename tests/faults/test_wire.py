"""The wire between a trainer and its service: cut, slow, or dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem import rpc
from tandem.errors import DeadlineExceeded, Reason, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from tests.faults import raw
from tests.faults.plane import NOTICED_S, Plane
from tests.faults.proxy import Proxy
from tests.faults.raw import SHARED, STREAM

BOTH = pytest.mark.parametrize("transport", [SHARED, STREAM], ids=["shared", "stream"])


@pytest.fixture
def proxy(plane: Plane, socket_folder: Path) -> Iterator[Proxy]:
    back = plane.service.address.removeprefix("unix://")
    with Proxy(f"{socket_folder}/front.sock", back) as proxy:
        yield proxy


@pytest.fixture
def stub(proxy: Proxy) -> Iterator[WeightServiceStub]:
    """The service at the other end of the wire."""
    with rpc.connect(proxy.address) as channel:
        yield WeightServiceStub(channel)


def far(plane: Plane, stub: WeightServiceStub, transport: int) -> raw.Session:
    """A session over the wire. The memory, if it is shared, needs none."""
    session = raw.Session(stub, plane.tensors, transport)
    return session.attach() if session.shared else session


def half(session: raw.Session, update: raw.Update, tensors: raw.Tensors) -> None:
    if session.shared:
        names = list(tensors)
        session.write({name: tensors[name] for name in names[::2]})
    else:
        for chunk in list(session.chunks(tensors))[:9]:
            update.send(chunk=chunk)


@BOTH
def test_a_cut_in_the_middle(plane: Plane, proxy: Proxy, stub: WeightServiceStub, transport: int) -> None:
    session = far(plane, stub, transport)
    with session, raw.watching(plane.stub) as changes, session.begin() as update:
        half(session, update, plane.tensors)
        raw.wait_for(changes, "WRITING" if session.shared else "STAGING")
        proxy.cut()
        cut = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            update.expect("committed")
        assert caught.value.reason == Reason.UNREACHABLE
        assert time.monotonic() - cut < NOTICED_S
        raw.wait_for(changes, "TORN" if session.shared else "COMMITTED")
        assert time.monotonic() - cut < NOTICED_S
        if session.shared:
            plane.assert_torn("the trainer vanished")
        else:
            plane.assert_unchanged()
        # The trainer lives, its session too: it connects anew, and gives everything again.
        assert session.update(plane.tensors) == plane.version + 1
    plane.assert_serves(plane.new, plane.version + 1)


@BOTH
def test_a_wire_on_which_nothing_arrives(
    plane: Plane, proxy: Proxy, stub: WeightServiceStub, transport: int
) -> None:
    """Neither side is told. The service knows by the heartbeats, the trainer by its own deadline."""
    session = far(plane, stub, transport)
    with session, raw.watching(plane.stub) as changes, session.begin(timeout=8) as update:
        half(session, update, plane.tensors)
        raw.wait_for(changes, "WRITING" if session.shared else "STAGING")
        proxy.swallow()
        swallowed = time.monotonic()
        update.send(commit=pb.CommitUpdate(digest=session.digest(plane.tensors)))
        raw.wait_for(changes, "TORN" if session.shared else "COMMITTED")
        assert time.monotonic() - swallowed < NOTICED_S
        if session.shared:
            plane.assert_torn("nothing was heard of the trainer for 2 s")
        else:
            plane.assert_unchanged()
        with pytest.raises(DeadlineExceeded):
            update.expect("committed")
        assert time.monotonic() - swallowed < 10


@BOTH
def test_a_slow_wire_is_only_slow(plane: Plane, socket_folder: Path, transport: int) -> None:
    back = plane.service.address.removeprefix("unix://")
    with (
        Proxy(f"{socket_folder}/slow.sock", back, delay_s=0.1) as proxy,
        rpc.connect(proxy.address) as channel,
        far(plane, WeightServiceStub(channel), transport) as session,
    ):
        assert session.update(plane.tensors) == plane.version + 1
    plane.assert_serves(plane.new, plane.version + 1)


def test_an_answer_that_is_lost_leaves_the_version_committed(
    plane: Plane, proxy: Proxy, stub: WeightServiceStub
) -> None:
    """The trainer cannot know; the version and the digest tell it."""
    session = far(plane, stub, STREAM)
    with raw.watching(plane.stub) as changes, session.begin() as update:
        for chunk in session.chunks(plane.tensors):
            update.send(chunk=chunk)
        update.send(commit=pb.CommitUpdate(digest=session.digest(plane.tensors)))
        while next(changes) != (plane.version + 1, "COMMITTED"):
            pass
        proxy.cut()
        try:
            update.expect("committed")  # it may have been faster than the cut
        except Unavailable as error:
            assert error.reason == Reason.UNREACHABLE  # noqa: PT017
    now = raw.now(stub, digest=True)
    assert (now.weight_version, now.digest) == (plane.version + 1, session.digest(plane.tensors))
