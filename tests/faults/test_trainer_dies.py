"""Trainers that are killed or stopped at each step of an update, each way in which weights move."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest

from tandem.errors import Aborted, Reason
from tests.faults import raw
from tests.faults.plane import NOTICED_S, Plane, what_is_held, what_is_left
from tests.faults.raw import IN_PLACE, SHARED, STAGED, STREAM
from tests.faults.trainer_process import PREPARED, STEPS, trainer

TRANSPORT = {"shared": SHARED, "stream": STREAM}
#: Where a trainer that shares the memory may have left a mix.
WRITING = ("begun", "half written", "written")
CASES = [("shared", step) for step in STEPS] + [("stream", step) for step in STEPS if step != "attached"]


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(made: Plane) -> Iterator[None]:
    """Of all that die here."""
    made.wait_until_alone()
    before = what_is_left(made.service)
    yield
    made.wait_until_alone()
    gc.collect()
    end = time.monotonic() + 10
    while what_is_held(made.service) != before and time.monotonic() < end:
        time.sleep(0.1)
    assert what_is_held(made.service) == before


@pytest.mark.parametrize(("transport", "step"), CASES)
def test_a_trainer_that_is_killed(plane: Plane, transport: str, step: str) -> None:
    address, kind = plane.service.address, TRANSPORT[transport]
    with raw.watching(plane.stub) as changes, trainer(address, kind, stop_at=step) as process:
        process.wait_for(step)
        killed = time.monotonic()
        process.kill()
        if transport == "shared" and step in WRITING:
            raw.wait_for(changes, "TORN")
            assert time.monotonic() - killed < NOTICED_S
            plane.assert_torn("the trainer")
        plane.wait_until_alone()
        if step == "committed":
            plane.assert_holds(seed=1)
        elif step == "asked to commit":  # it was heard or not
            outcome = next(
                c for c in changes if c[1] == "TORN" or c[0] > plane.version or transport == "stream"
            )
            if outcome[0] > plane.version:
                plane.assert_holds(seed=1)
            elif transport == "shared":
                plane.assert_torn("the trainer")
        elif transport == "stream" or step not in WRITING:
            plane.assert_unchanged()
    with trainer(address, kind, seed=2) as after:  # the next one finds a service that takes it
        after.wait_for("committed")
        after.wait_for("over")
    plane.assert_holds(seed=2)


@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize(
    ("transport", "mode", "step"),
    [
        ("shared", STAGED, "half written"),
        ("shared", STAGED, PREPARED),
        ("stream", STAGED, PREPARED),
        ("stream", IN_PLACE, "begun"),
        ("stream", IN_PLACE, "half written"),
    ],
)
def test_a_trainer_that_dies_in_the_other_modes(
    plane: Plane, transport: str, mode: int, step: str, how: str
) -> None:
    """What is staged is dropped. What was streamed into live weights is torn, and healed by the next whole update."""
    address, kind = plane.service.address, TRANSPORT[transport]
    tears = mode == IN_PLACE and step == "half written"
    for attempt in range(5):
        with (
            raw.watching(plane.stub) as changes,
            trainer(address, kind, mode=mode, stop_at=step) as process,
        ):
            process.wait_for(step)
            raw.wait_for(changes, "STAGING" if mode == STAGED else "WRITING")
            time.sleep(0.3 * attempt)
            getattr(process, how)()
            torn = raw.wait_for_either(changes, "TORN", "COMMITTED") == "TORN"
            if torn:
                plane.assert_torn("the trainer")
            else:
                plane.assert_unchanged()
            if how == "freeze":
                process.thaw()
                process.go_on()  # too late: it has lost its lease
                assert process.wait_for("error") == "error LEASE_LOST"
        plane.wait_until_alone()
        if torn or not tears:
            break  # or nothing was heard yet of what it had sent
    assert torn == tears
    with trainer(address, kind, mode=mode, seed=2) as after:
        after.wait_for("committed")
        after.wait_for("over")
    plane.assert_holds(seed=2)


def test_a_stopped_trainer_that_shares(plane: Plane) -> None:
    """It has lost its lease and does not know. Nothing is served that it might still write to."""
    with (
        raw.watching(plane.stub) as changes,
        trainer(plane.service.address, SHARED, stop_at="half written") as process,
    ):
        process.wait_for("half written")
        stopped = time.monotonic()
        process.freeze()
        raw.wait_for(changes, "TORN")
        assert time.monotonic() - stopped < NOTICED_S
        plane.assert_torn("nothing was heard of the trainer for 2 s")
        for call in (lambda: raw.restore(plane.stub), lambda: plane.open(STREAM)):
            with pytest.raises(Aborted) as caught:
                call()
            assert caught.value.reason == Reason.LEASE_HELD
        process.thaw()
        process.go_on()  # it writes the other half, and asks for a commit
        assert process.wait_for("error") == "error LEASE_LOST"
        plane.assert_torn("nothing was heard of the trainer for 2 s")
        process.wait_for("over")
    plane.wait_until_alone()
    assert raw.restore(plane.stub) == plane.version + 1
    assert raw.now(plane.stub, digest=True).digest == plane.digest


def test_a_stopped_trainer_that_is_killed(plane: Plane) -> None:
    with (
        raw.watching(plane.stub) as changes,
        trainer(plane.service.address, SHARED, stop_at="half written") as process,
    ):
        process.wait_for("half written")
        process.freeze()
        raw.wait_for(changes, "TORN")
        process.kill()
        plane.wait_until_alone()
        raw.restore(plane.stub)
        assert raw.now(plane.stub, digest=True).digest == plane.digest


def test_a_stopped_trainer_that_streams(plane: Plane) -> None:
    with (
        raw.watching(plane.stub) as changes,
        trainer(plane.service.address, STREAM, stop_at="half written") as process,
    ):
        process.wait_for("half written")
        raw.wait_for(changes, "STAGING")
        stopped = time.monotonic()
        process.freeze()
        raw.wait_for(changes, "COMMITTED")
        assert time.monotonic() - stopped < NOTICED_S
        plane.assert_unchanged()
        process.thaw()
        process.go_on()
        assert process.wait_for("error") == "error LEASE_LOST"
    plane.assert_unchanged()


def test_a_trainer_stopped_outside_an_update_keeps_its_session_and_nobody_waits(plane: Plane) -> None:
    with trainer(plane.service.address, SHARED, stop_at="attached") as process:
        process.wait_for("attached")
        process.freeze()
        plane.assert_unchanged()
        with pytest.raises(Aborted) as caught:
            plane.open(SHARED)
        assert caught.value.reason == Reason.LEASE_HELD
        process.thaw()
        process.go_on()
        process.wait_for("committed")
    plane.assert_holds(seed=1)


def test_two_trainers_at_once(plane: Plane) -> None:
    """One has the lease. What the other is told does not disturb it."""
    address = plane.service.address
    with trainer(address, STREAM, stop_at="half written") as first:
        first.wait_for("half written")
        with trainer(address, STREAM, seed=2) as second:
            assert second.wait_for("error") == "error LEASE_HELD"
        first.go_on()
        first.wait_for("committed")
    plane.assert_holds(seed=1)
