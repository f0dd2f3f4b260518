"""The processes that stand by: one after the other, and none that is left over."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from trainer_service.jobs import processes
from trainer_service.jobs import standby as module
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.standby import Standbys, Waiting


@pytest.fixture
async def standbys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Standbys]:
    """Of processes that load nothing."""

    def start(root: Path) -> Waiting:
        reading, writing = os.pipe()
        mark = root / f"standby-{writing}-{time.monotonic_ns()}"
        process = subprocess.Popen(
            ["cat"], stdin=reading, env=os.environ | {MARK: str(mark)}, start_new_session=True
        )
        process.returncode = 0  # waited for by its identity
        os.close(reading)
        return Waiting(Identity.of(process.pid), writing, mark)

    monkeypatch.setattr(module, "_start", start)
    monkeypatch.setattr(module, "_LOOK_S", 0.02)
    monkeypatch.setattr(module, "_AGAIN_S", 0.02)
    made = Standbys(2, tmp_path)
    made.start()
    yield made
    await made.stop()


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_the_next_one_comes_when_the_job_has_begun(standbys: Standbys) -> None:
    await until(lambda: len(standbys._ready) == 2)
    taken = standbys.take()
    assert taken is not None
    try:
        for _ in range(10):
            await asyncio.sleep(0.02)
            assert len(standbys._ready) == 1  # the job has the machine for itself
        standbys.refill()
        await until(lambda: len(standbys._ready) == 2)
        assert taken not in standbys._ready
    finally:
        taken.end()


async def test_those_that_end_by_themselves_have_successors(standbys: Standbys) -> None:
    await until(lambda: len(standbys._ready) == 2)
    first = list(standbys._ready)
    for one in first:
        os.kill(one.identity.pid, 9)
    await until(lambda: len(standbys._ready) == 2 and not set(map(id, first)) & set(map(id, standbys._ready)))


async def test_one_that_has_ended_is_not_taken(standbys: Standbys) -> None:
    await until(lambda: len(standbys._ready) == 2)
    os.kill(standbys._ready[0].identity.pid, 9)
    alive = standbys._ready[1]
    await until(lambda: not standbys._ready[0].identity.alive or standbys._ready[0] is alive)
    taken = standbys.take()
    assert taken is not None
    assert taken.identity.alive
    taken.end()


async def test_stopped_it_leaves_none(standbys: Standbys) -> None:
    await until(lambda: len(standbys._ready) == 2)
    kept = list(standbys._ready)
    await standbys.stop()
    assert [processes.members(one.mark, one.identity) for one in kept] == [set(), set()]
    assert standbys.take() is None
