"""Services with a real engine: killed, stopped in order, or left by their engine, in the middle of an update."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.errors import NotFound, Reason, TandemError, Unavailable
from tandem.inference.v1 import inference_pb2
from tests.faults import raw
from tests.faults.oracle import Rollouts
from tests.faults.plane import Plane
from tests.faults.raw import SHARED, STREAM
from tests.services import inference_service

TOLD_S = 5.0


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        yield Path(folder)


@contextmanager
def started(checkpoints: dict[str, Path], folder: Path, *flags: str) -> Iterator[Plane]:
    """A service of its own, always at the same address, with a folder of its own for what it leaves."""
    own = folder / "tmp"
    own.mkdir(exist_ok=True)
    environment = {"TMPDIR": str(own)}
    with inference_service(
        checkpoints["llama"], folder, *flags, wait=False, environment=environment
    ) as service:
        service.wait_until("SERVING", 240)
        yield Plane(service, checkpoints["llama"])


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != "zombie")
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < end, f"processes {left} are left"
        time.sleep(0.05)


def test_a_service_that_stops_in_order_lets_an_update_end(checkpoints: dict[str, Path], folder: Path) -> None:
    with started(checkpoints, folder, "--grace-s=20") as plane:
        processes = plane.service.children()
        assert list((folder / "tmp").glob("tandem-*")), "the descriptor socket is looked for where it is not"
        with plane.open(SHARED) as session, raw.watching(plane.stub) as changes, session.begin() as update:
            raw.wait_for(changes, "WRITING")
            plane.service.process.send_signal(signal.SIGTERM)
            assert list(changes) == [], "a watch ends, and not with an error"
            with pytest.raises(TandemError) as caught:
                plane.open(STREAM)
            assert caught.value.reason in (Reason.DRAINING, Reason.UNREACHABLE)
            session.write(plane.tensors)
            assert update.commit(session.digest(plane.tensors)) == plane.version + 1
            update.end()
        assert plane.service.process.wait(30) == 0
        wait_until_gone(processes)
    assert not list((folder / "tmp").glob("tandem-*")), "a socket was left"


def test_a_killed_service_and_the_one_that_comes_after(checkpoints: dict[str, Path], folder: Path) -> None:
    with started(checkpoints, folder) as plane:
        processes = plane.service.children()
        session = plane.open(SHARED)
        with session.begin() as update:
            rollouts = Rollouts(plane.service, max_tokens=8)
            session.write({name: plane.tensors[name] for name in plane.names[::2]})
            plane.service.process.kill()
            killed = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                update.commit(session.digest(plane.tensors))
            assert caught.value.reason == Reason.UNREACHABLE
            rollouts.join()
            assert rollouts.error is not None
            assert rollouts.error.reason == Reason.UNREACHABLE
            assert time.monotonic() - killed < TOLD_S
        wait_until_gone(processes)
    session.write(plane.tensors)  # into memory that is only ours by now
    with started(checkpoints, folder) as again:
        with rpc.connect(again.service.address) as channel:
            session.stub = raw.WeightServiceStub(channel)
            with pytest.raises(NotFound) as gone:
                session.begin(again.version)
            assert gone.value.reason == Reason.SESSION_NOT_FOUND
        session.close()
        assert again.digest == plane.digest, "it starts from the checkpoint"
        with again.open(SHARED) as anew:
            assert anew.answer.engine_id != session.answer.engine_id
            anew.update(again.tensors)
            again.assert_serves(again.new, again.version + 1)
        again.wait_until_alone()
        the_engine_dies(again)


def the_engine_dies(plane: Plane) -> None:
    """In an open update, with rollouts that wait for its end."""
    with plane.open(SHARED) as session, session.begin() as update:
        rollouts = Rollouts(plane.service, max_tokens=8)
        session.write(plane.tensors)
        for pid in plane.service.children():
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        rollouts.join()
        assert rollouts.error is not None
        assert rollouts.error.reason == Reason.ENGINE_DEAD
        with pytest.raises(Unavailable) as caught:
            update.commit(session.digest(plane.tensors))
        assert caught.value.reason == Reason.ENGINE_DEAD
        while plane.service.health() != "NOT_SERVING":
            assert time.monotonic() - killed < TOLD_S
    for call in (
        lambda: plane.open(SHARED),
        lambda: plane.open(STREAM),
        lambda: raw.now(plane.stub),
        lambda: raw.restore(plane.stub),
    ):
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.reason == Reason.ENGINE_DEAD
    for name in ("WeightService", "EngineService"):
        package = name.removesuffix("Service").lower() + ("s" if name == "WeightService" else "")
        assert plane.service.health(f"tandem.{package}.v1.{name}") == "NOT_SERVING"
    model = plane.service.inference.GetModel(inference_pb2.GetModelRequest(), timeout=5)
    assert model.state == engine_pb2.SERVING_STATE_DEAD
    assert plane.service.stop() == 0


@contextmanager
def hanging(plane: Plane) -> Iterator[list[int]]:
    """Around what is told of an engine whose process stands still. Yields the service's processes."""
    processes = plane.service.children()
    (engine,) = [pid for pid in processes if "EngineCore" in psutil.Process(pid).cmdline()[0]]
    os.kill(engine, signal.SIGSTOP)
    stopped = time.monotonic()
    yield processes
    while plane.service.health() != "NOT_SERVING":
        assert time.monotonic() - stopped < 2 + TOLD_S
        time.sleep(0.05)
    with pytest.raises(Unavailable) as caught:
        raw.restore(plane.stub)
    assert caught.value.reason == Reason.ENGINE_DEAD
    assert plane.service.stop() == 0
    wait_until_gone(processes)


def test_an_engine_that_hangs_before_it_takes_an_update_is_taken_for_dead(
    checkpoints: dict[str, Path], folder: Path
) -> None:
    with started(checkpoints, folder, "--engine-timeout-s=2") as plane:
        session = plane.open(STREAM, mode=raw.STAGED)
        with session.begin() as update:
            for chunk in session.chunks(plane.tensors):
                update.send(chunk=chunk)
            digest = session.digest(plane.tensors)
            with hanging(plane):
                with pytest.raises(Unavailable) as caught:
                    update.commit(digest)
                assert caught.value.reason == Reason.ENGINE_DEAD


def test_an_engine_that_hangs_when_all_is_in_its_memory_is_taken_for_dead(
    checkpoints: dict[str, Path], folder: Path
) -> None:
    with started(checkpoints, folder, "--engine-timeout-s=2") as plane:
        with plane.open(SHARED) as session, session.begin() as update:
            session.write(plane.tensors)
            digest = session.digest(plane.tensors)
            with hanging(plane):
                # Not a word of the engine is needed where it has forgotten what it had cached: then this commits.
                outcome: object
                try:
                    outcome = update.commit(digest)
                except Unavailable as error:
                    outcome = error.reason
                assert outcome in (plane.version + 1, Reason.ENGINE_DEAD)
