"""A pause and the end of the workers' kernels, asked for at once."""

from __future__ import annotations

import asyncio

import pytest

from inference_service.halt import halted


class Core:
    """Does what it is told in order; a pause waits for the step that runs."""

    def __init__(self, step_s: float | None = None) -> None:
        self.step_s = step_s
        self.done: list[str] = []
        self.failing: Exception | None = None

    async def pause(self) -> None:
        if self.step_s is not None:
            await asyncio.sleep(self.step_s)
            self.done.append("step")
        self.done.append("pause")

    async def collective_rpc(self, method: str, **given: float) -> list[None]:
        await asyncio.sleep(0.01)
        if self.failing:
            raise self.failing
        self.done.append(method)
        return [None]


async def test_an_idle_engine_is_asked_once() -> None:
    core = Core()
    await halted(core, core.pause(), 5)
    assert core.done == ["pause", "tandem_settle"]


async def test_kernels_of_a_step_that_still_ran_are_waited_for() -> None:
    core = Core(step_s=0.1)
    await halted(core, core.pause(), 5)
    assert core.done == ["tandem_settle", "step", "pause", "tandem_settle"]


async def test_workers_that_fail_leave_no_call() -> None:
    core = Core(step_s=60)
    core.failing = RuntimeError("no device")
    with pytest.raises(RuntimeError, match="no device"):
        await asyncio.wait_for(halted(core, core.pause(), 5), 5)
    assert asyncio.all_tasks() == {asyncio.current_task()}
