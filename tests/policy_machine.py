"""The weight state machine with stand-ins: an engine and arenas' hooks that hang or fail when told to.

Memory and digests are real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import torch

from inference_service.arenas import HostArenas
from inference_service.policy import FIRST_VERSION, Policy, WeightState
from inference_service.transports import SHARED, STREAM, Way
from inference_service.update import Update
from tandem.errors import Reason, TandemError, Unavailable
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement

SHAPES = {"a": (3, 4), "b": (5,)}


class Engine:
    """What the policy asks of an engine. Each call hangs or fails where a test says so.

    As with the real one, a pause that fails lets go of what it held, even if its holder had held it before.
    """

    def __init__(self) -> None:
        self.dead = False
        self.holders: set[str] = set()
        self.calls: list[str] = []
        self.settled: list[bool] = []  # whether it was asked to have its kernels done when it was halted
        self.failing: dict[str, BaseException] = {}
        self.hanging: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}
        self.llm = self

    async def pause(
        self, who: str, mode: str = "keep", clear_cache: bool = True, *, settle: bool = False
    ) -> None:
        self.holders.add(who)
        try:
            await self.step(f"pause {mode}")
        except BaseException:
            self.holders.discard(who)
            raise

    async def halt(
        self, who: str, mode: str = "keep", *, settle: bool = False, keep_cache: Any = None
    ) -> asyncio.Future[None]:
        self.settled.append(settle)
        await self.pause(who, mode, settle=settle)
        return await self.forget()

    async def forget(self) -> asyncio.Future[None]:
        forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if error := self.failing.get("forget"):
            forgotten.set_exception(error)
        else:
            forgotten.set_result(None)
        return forgotten

    async def release(self, who: str) -> None:
        self.holders.discard(who)
        await self.step("resume")

    def held_by(self, who: str) -> bool:
        return who in self.holders

    async def call_workers(self, method: str) -> list[None]:
        await self.step(method)
        return [None]

    async def abort(self, request_ids: list[str]) -> None:
        await self.step("abort")

    def tokens_so_far(self, request_id: str) -> int:
        if "count" in self.failing:
            raise self.failing["count"]
        return 7

    @property
    def generating(self) -> bool:
        return not self.holders

    def hang(self, call: str) -> tuple[asyncio.Event, asyncio.Event]:
        """Have the next `call` hang. Returns (reached, go on)."""
        self.hanging[call] = asyncio.Event(), asyncio.Event()
        return self.hanging[call]

    async def step(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(0)
        if gate := self.hanging.pop(call, None):
            gate[0].set()
            await gate[1].wait()
        if error := self.failing.get(call):
            raise error
        if self.dead:
            raise Unavailable(Reason.ENGINE_DEAD, "dead")


class Arenas(HostArenas):
    """Real memory, whose thread-run work hangs or fails where a test says so."""

    failing: BaseException | None = None
    gate: tuple[threading.Event, threading.Event] | None = None

    def hang(self) -> tuple[threading.Event, threading.Event]:
        self.gate = threading.Event(), threading.Event()
        return self.gate

    def write(self, tensors: list[Any]) -> None:
        self._wait()
        if self.failing is not None:
            super().write([torch.full_like(tensors[0], 9), *tensors[1:]])  # some, and wrongly
            raise self.failing
        super().write(tensors)

    def digest(self) -> int:
        found = super().digest()
        self._wait()
        if self.failing is not None:
            raise self.failing
        return found

    def _wait(self) -> None:
        if self.gate is not None:
            gate, self.gate = self.gate, None
            gate[0].set()
            assert gate[1].wait(10)


class Trainer:
    """The writer of an in-place update: another process."""

    alive = True


class Machine:
    """A policy with its stand-ins, and what a trainer does with them."""

    def __init__(self, reloads: bool = False) -> None:
        offsets, placements = 0, []
        for name, shape in SHAPES.items():
            spec = TensorSpec(name, "float32", shape)
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            placements.append(Placement(spec, (Block(0, offsets, strides, 0, strides, shape),)))
            offsets += 256
        self.arenas = Arenas([Arena.create("test", offsets)], placements, reloads)
        self.engine = Engine()
        self.policy = Policy(self.engine, self.arenas)  # type: ignore[arg-type]
        self.trainer, self.another = Trainer(), Trainer()
        self.update: Update | None = None
        self.seen: list[tuple[WeightState, int]] = []
        self.policy.changed.append(lambda: self.seen.append((self.policy.state, self.policy.version)))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [placement.view(self.arenas.arenas) for placement in self.arenas.placements]

    @property
    def held(self) -> bool:
        """Whether somebody has the lease."""
        return self.policy._update is not None

    def values(self, version: int) -> list[torch.Tensor]:
        """What a trainer would write as `version`."""
        return [torch.full(shape, float(version)) for shape in SHAPES.values()]

    async def begin(
        self, in_place: bool, base: int | None = None, trainer: Any = None, **kwargs: Any
    ) -> Update:
        base = self.policy.version if base is None else base
        writer = (trainer or self.trainer) if in_place else None
        way = Way(SHARED if in_place else STREAM, in_place=in_place)
        self.update = await self.policy.begin(base, way, writer=writer, **kwargs)
        return self.update

    def write(self) -> int:
        """Bring the next version's bytes, whichever way. Returns their digest."""
        assert self.update is not None
        values = self.values(self.policy.version + 1)
        if self.update.in_place:
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)
        else:
            for i, value in enumerate(values):
                self.update.chunk(i, 0, value.numpy().tobytes())
        return combine(digest_tensors(values))

    def check(self) -> None:
        """What always holds between two moves."""
        state, engine = self.policy.state, self.engine
        assert bool(self.policy.torn) or state is not WeightState.TORN
        if state is WeightState.WRITING or self.policy.torn:
            assert "update" in engine.holders, "generation goes on while the weights are written or torn"
        elif not self.held and not engine.dead:
            assert "update" not in engine.holders, "an update that is over holds generation"
        if state in (WeightState.COMMITTED, WeightState.STAGING) and self.policy.version > FIRST_VERSION:
            values = self.values(self.policy.version)
            assert all(map(torch.equal, self.tensors, values)), "the weights are not the committed version's"
        if self.held:
            assert self.seen[-1:] == [(state, self.policy.version)] or not self.seen or self.update is None
        elif self.seen:
            assert self.seen[-1] == (state, self.policy.version), "a change was not told"


async def outcome(move: Awaitable[Any]) -> str:
    """ "" or the reason of the error."""
    try:
        async with asyncio.timeout(10):
            await move
    except TandemError as error:
        return str(error.reason)
    return ""


async def free(m: Machine) -> None:
    """Wait until nobody has the lease."""
    over = asyncio.Event()
    m.policy.changed.append(lambda: None if m.held else over.set())
    async with asyncio.timeout(5):
        if m.held:
            await over.wait()
        await asyncio.gather(*m.policy._ending)
