"""The process that checks jobs: what becomes of one that does not answer, or dies. It is a stand-in here."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tandem.errors import Internal, InvalidArgument, Reason, Unavailable
from tests.jobs import spec
from trainer_service.jobs import checker
from trainer_service.jobs.checker import Checker


@pytest.fixture
async def checks() -> AsyncIterator[Checker]:
    made = Checker()
    yield made
    await made.stop()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is run in place of Python."""
    path = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def write(program: Path, *lines: str) -> None:
    program.write_text("\n".join(["#!/bin/sh", *lines]))
    program.chmod(0o700)


def runs(stat: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may go at any time
        return stat.read_text().split()[2] != "Z"
    return False


async def test_one_that_does_not_answer_is_ended_and_the_next_one_asked(
    checks: Checker, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "_TIMEOUT_S", 1.0)
    forked = tmp_path / "forked"
    write(program, f"sleep 600 & echo $! > {forked}; wait")  # as a check is a fork, which may wait for ever
    await checks.start()
    silent = checks._process
    end = time.monotonic() + 60
    while not (forked.exists() and forked.read_text()):
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    with pytest.raises(Unavailable, match="took too long") as raised:
        await checks.check(spec())
    assert raised.value.reason is Reason.UNREACHABLE
    assert silent is not None
    assert await silent.wait() == -9
    fork = Path(f"/proc/{forked.read_text().strip()}/stat")
    while runs(fork):
        assert time.monotonic() < end, "what the process had started goes on"
        await asyncio.sleep(0.02)
    monkeypatch.setattr(checker, "_TIMEOUT_S", 60.0)
    write(program, """while read line; do echo '[{"field": "job.a", "description": "is wrong"}]'; done""")
    for _ in range(2):  # by one process
        with pytest.raises(InvalidArgument, match="is wrong") as refused:
            await checks.check(spec())
        assert [violation.field for violation in refused.value.violations] == ["job.a"]


@pytest.mark.parametrize("dies", ["exit 1", "read line; exit 1"])
async def test_one_that_was_killed_has_a_successor(
    checks: Checker, program: Path, tmp_path: Path, dies: str
) -> None:
    there = tmp_path / "there"
    write(program, f"test -e {there} || {{ touch {there}; {dies}; }}", "while read line; do echo '[]'; done")
    await checks.check(spec())
    assert there.exists()


@pytest.mark.parametrize("answer", ["exit 1", "read line; exit 1", "read line; echo null"])
async def test_a_check_that_fails_is_told(checks: Checker, program: Path, answer: str) -> None:
    write(program, answer)
    for _ in range(2):
        with pytest.raises(Internal, match="the service's log has why") as raised:
            await checks.check(spec())
        assert raised.value.reason is Reason.BUG
    write(program, "while read line; do echo '[]'; done")
    await checks.check(spec())
