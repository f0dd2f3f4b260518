"""Services that are killed at each step of an update: the trainer is told at once, and what comes back takes it.

Most of them have an engine that computes nothing, around the real weight plane, since they start in a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem import rpc
from tandem.errors import NotFound, Reason, TandemError, Unavailable
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from tests.faults import raw
from tests.faults.raw import SHARED, STREAM
from tests.faults.trainer_process import STEPS, tensors_for
from tests.weight_service import WeightService

#: How soon a trainer is told. Nothing here waits for a deadline, which would be 20 s.
TOLD_S = 5.0
TRANSPORT = {"shared": SHARED, "stream": STREAM}
CASES = [("shared", step) for step in STEPS] + [("stream", step) for step in STEPS if step != "attached"]


@pytest.fixture
def service(socket_folder: Path) -> Iterator[WeightService]:
    service = WeightService(f"unix://{socket_folder}/s.sock", 2.0)
    service.start()
    yield service
    service.kill()


@pytest.fixture
def stub(service: WeightService) -> Iterator[WeightServiceStub]:
    with rpc.connect(service.address) as channel:
        stub = WeightServiceStub(channel)
        ready(stub)
        yield stub


def ready(stub: WeightServiceStub) -> pb.GetWeightVersionResponse:
    return stub.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=30, wait_for_ready=True)


def steps(stub: WeightServiceStub, transport: int, sessions: list[raw.Session]) -> Iterator[str]:
    """A trainer's update, step by step. Each name is yielded when that step is done."""
    tensors = tensors_for(raw.manifest(stub), 1)
    session = raw.Session(stub, tensors, transport)
    sessions.append(session)
    yield "opened"
    if session.shared:
        session.attach()
        yield "attached"
    update = session.begin()
    yield "begun"
    names, chunks = list(tensors), list(session.chunks(tensors, 16))
    for half in range(2):
        if session.shared:
            session.write({name: tensors[name] for name in names[half::2]})
        else:
            middle = len(chunks) // 2
            for chunk in chunks[middle:] if half else chunks[:middle]:
                update.send(chunk=chunk)
        yield "written" if half else "half written"
    update.send(commit=pb.CommitUpdate(digest=session.digest(tensors)))
    yield "asked to commit"
    session.version = update.expect("committed").weight_version
    yield "committed"
    session.begin()


@pytest.mark.parametrize(("transport", "step"), CASES)
def test_a_service_that_is_killed(
    service: WeightService, stub: WeightServiceStub, transport: str, step: str
) -> None:
    sessions: list[raw.Session] = []
    trainer = steps(stub, TRANSPORT[transport], sessions)
    while next(trainer) != step:
        pass
    service.kill()
    killed = time.monotonic()
    # Shared memory outlives its owner, and an answer may have been on its way: nothing else succeeds.
    with pytest.raises((TandemError, OSError)) as caught:
        assert set(trainer) <= {"half written", "written", "asked to commit", "committed"}
    assert time.monotonic() - killed < TOLD_S
    if isinstance(caught.value, TandemError):
        assert isinstance(caught.value, Unavailable)
        assert caught.value.reason == Reason.UNREACHABLE
    else:
        assert (transport, step) == ("shared", "opened")
        # Nobody listens there, or any service that started since has removed what this one left.
        assert isinstance(caught.value, ConnectionRefusedError | FileNotFoundError)
    (session,) = sessions
    if session.connection is not None:
        session.connection.settimeout(5)
        assert session.connection.recv(1) == b"", "the end of the session is told too"
    service.start()
    assert ready(stub).weight_version == 1
    with pytest.raises(NotFound) as gone:
        session.begin(1)
    assert gone.value.reason == Reason.SESSION_NOT_FOUND
    session.close()
    tensors = tensors_for(raw.manifest(stub), 2)
    with raw.Session(stub, tensors, TRANSPORT[transport]) as again:
        if again.shared:
            again.attach()
        assert again.answer.engine_id != session.answer.engine_id
        assert again.update(tensors) == 2
        assert raw.now(stub, digest=True).digest == again.digest(tensors)


CALLS: dict[str, Callable[[WeightServiceStub], object]] = {
    "restore": lambda stub: raw.restore(stub),
    "digest": lambda stub: raw.now(stub, digest=True),
    "manifest": lambda stub: raw.manifest(stub),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls_are_told_too(
    service: WeightService, stub: WeightServiceStub, call: Callable[[WeightServiceStub], object]
) -> None:
    service.kill()
    killed = time.monotonic()
    with pytest.raises(Unavailable) as caught, rpc.translated():
        call(stub)
    assert caught.value.reason == Reason.UNREACHABLE
    assert time.monotonic() - killed < TOLD_S


def test_watchers_are_told_too(service: WeightService, stub: WeightServiceStub) -> None:
    with raw.watching(stub) as changes:
        next(changes)
        service.kill()
        killed = time.monotonic()
        with pytest.raises(Unavailable), rpc.translated():
            next(changes)
        assert time.monotonic() - killed < TOLD_S
