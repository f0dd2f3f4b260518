"""The weight state machine: every move in every state, and every await as a place where something breaks.

The engine and the arenas' hooks are stand-ins that hang or fail when told to. Memory and digests are real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_service.arenas import HostArenas
from inference_service.policy import FIRST_VERSION, Policy, WeightState
from inference_service.rollouts import Track
from inference_service.servicers.weights import WeightServicer
from inference_service.transports import SHARED, STREAM, Way
from inference_service.update import Update
from tandem.errors import Aborted, FailedPrecondition, InvalidArgument, Reason, TandemError, Unavailable
from tandem.weights.v1 import weights_pb2
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """structlog's default renders tracebacks for seconds."""
    with structlog.testing.capture_logs():
        yield


SHAPES = {"a": (3, 4), "b": (5,)}


class Engine:
    """What the policy asks of an engine. Each call hangs or fails where a test says so.

    As with the real one, a pause that fails lets go of what it held, even if its holder had held it before.
    """

    def __init__(self) -> None:
        self.dead = False
        self.holders: set[str] = set()
        self.calls: list[str] = []
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

    async def halt(self, who: str, mode: str = "keep", *, settle: bool = False) -> asyncio.Future[None]:
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


# The states, and how they come about.


async def committed(m: Machine) -> None:
    pass


async def staging(m: Machine) -> None:
    await m.begin(in_place=False)


async def writing(m: Machine) -> None:
    await m.begin(in_place=True)


async def torn(m: Machine) -> None:
    await writing(m)
    m.tensors[0].fill_(-1.0)
    m.trainer.alive = False
    assert m.update is not None
    await m.update.lose("it died")
    m.update = None
    m.trainer = Trainer()


async def torn_staging(m: Machine) -> None:
    await torn(m)
    await staging(m)


async def torn_writing(m: Machine) -> None:
    await torn(m)
    await writing(m)


async def stray(m: Machine) -> None:
    """Torn by a trainer that lost its lease and still has the memory."""
    await writing(m)
    m.tensors[0].fill_(-1.0)
    assert m.update is not None
    await m.update.lose("not heard of")
    m.update = None


STATES = (committed, staging, writing, torn, torn_staging, torn_writing, stray)


# The events. Those of an update that is not open are its trainer's alone, and cannot happen.


async def begin_writing(m: Machine) -> str:
    return await outcome(m.begin(in_place=True))


async def begin_writing_as_another(m: Machine) -> str:
    return await outcome(m.begin(in_place=True, trainer=m.another))


async def begin_staging(m: Machine) -> str:
    return await outcome(m.begin(in_place=False))


async def begin_on_old_base(m: Machine) -> str:
    return await outcome(m.begin(in_place=True, base=m.policy.version - 1))


async def begin_on_future_base(m: Machine) -> str:
    return await outcome(m.begin(in_place=False, base=m.policy.version + 1))


async def restore(m: Machine) -> str:
    m.engine.step = _restoring(m, m.engine.step)  # type: ignore[method-assign]
    return await outcome(m.policy.restore())


def _restoring(m: Machine, step: Callable[[str], Awaitable[None]]) -> Callable[[str], Awaitable[None]]:
    async def restored(call: str) -> None:
        if call == "tandem_restore":
            for tensor, value in zip(m.tensors, m.values(m.policy.version + 1), strict=True):
                tensor.copy_(value)
        await step(call)

    return restored


async def read_digest(m: Machine) -> str:
    return await outcome(m.policy.digest())


async def write_and_commit(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.commit(m.write()))


async def commit_with_a_wrong_digest(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.commit(m.write() ^ 1))


async def commit_half(m: Machine) -> str:
    """One tensor of two: unfinished if staged, of another digest than the trainer's if in place."""
    assert m.update is not None
    value = m.values(m.policy.version + 1)
    if m.update.in_place:
        m.tensors[0].copy_(value[0])
    else:
        m.update.chunk(0, 0, value[0].numpy().tobytes())
    return await outcome(m.update.commit(combine(digest_tensors(value))))


async def stage_out_of_order(m: Machine) -> str:
    async def chunk() -> None:
        assert m.update is not None
        m.update.chunk(0, 8, b"12345678")

    return await outcome(chunk())


async def abort_untouched(m: Machine) -> str:
    assert m.update is not None
    return await outcome(m.update.abort(untouched=True, reason="thought better of it"))


async def abort_touched(m: Machine) -> str:
    assert m.update is not None
    if m.update.in_place:
        m.tensors[1].fill_(-2.0)
    return await outcome(m.update.abort(untouched=False, reason="an exception"))


async def lose(m: Machine) -> str:
    assert m.update is not None
    if m.update.in_place:
        m.tensors[1].fill_(-2.0)
    return await outcome(m.update.lose("the trainer vanished"))


C, S, W, T = WeightState
HELD, BASE, ORDER = Reason.LEASE_HELD, Reason.BASE_VERSION_MISMATCH, Reason.UPDATE_ORDER
DIGEST, TORN = Reason.DIGEST_MISMATCH, Reason.ENGINE_TORN

#: state: {event: (error, state afterwards, versions committed)}
TABLE: dict[Any, dict[Any, tuple[str, WeightState, int]]] = {
    committed: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: ("", W, 0),
        begin_staging: ("", S, 0),
        begin_on_old_base: (BASE, C, 0),
        begin_on_future_base: (BASE, C, 0),
        restore: ("", C, 1),
        read_digest: ("", C, 0),
    },
    staging: {
        begin_writing: (HELD, S, 0),
        begin_writing_as_another: (HELD, S, 0),
        begin_staging: (HELD, S, 0),
        begin_on_old_base: (HELD, S, 0),
        begin_on_future_base: (HELD, S, 0),
        restore: (HELD, S, 0),
        read_digest: ("", S, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, C, 0),
        commit_half: (ORDER, C, 0),
        stage_out_of_order: (ORDER, S, 0),
        abort_untouched: ("", C, 0),
        abort_touched: ("", C, 0),
        lose: ("", C, 0),
    },
    writing: {
        begin_writing: (HELD, W, 0),
        begin_writing_as_another: (HELD, W, 0),
        begin_staging: (HELD, W, 0),
        begin_on_old_base: (HELD, W, 0),
        begin_on_future_base: (HELD, W, 0),
        restore: (HELD, W, 0),
        read_digest: (HELD, W, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (DIGEST, T, 0),
        stage_out_of_order: (ORDER, W, 0),
        abort_untouched: ("", C, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    torn: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: ("", W, 0),
        begin_staging: ("", T, 0),
        begin_on_old_base: (BASE, T, 0),
        begin_on_future_base: (BASE, T, 0),
        restore: ("", C, 1),
        read_digest: ("", T, 0),
    },
    torn_staging: {
        begin_writing: (HELD, T, 0),
        begin_writing_as_another: (HELD, T, 0),
        begin_staging: (HELD, T, 0),
        begin_on_old_base: (HELD, T, 0),
        begin_on_future_base: (HELD, T, 0),
        restore: (HELD, T, 0),
        read_digest: ("", T, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (ORDER, T, 0),
        stage_out_of_order: (ORDER, T, 0),
        abort_untouched: (TORN, T, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    torn_writing: {
        begin_writing: (HELD, W, 0),
        begin_writing_as_another: (HELD, W, 0),
        begin_staging: (HELD, W, 0),
        begin_on_old_base: (HELD, W, 0),
        begin_on_future_base: (HELD, W, 0),
        restore: (HELD, W, 0),
        read_digest: (HELD, W, 0),
        write_and_commit: ("", C, 1),
        commit_with_a_wrong_digest: (DIGEST, T, 0),
        commit_half: (DIGEST, T, 0),
        stage_out_of_order: (ORDER, W, 0),
        abort_untouched: (TORN, T, 0),
        abort_touched: (TORN, T, 0),
        lose: ("", T, 0),
    },
    stray: {
        begin_writing: ("", W, 0),
        begin_writing_as_another: (HELD, T, 0),
        begin_staging: (HELD, T, 0),
        begin_on_old_base: (BASE, T, 0),
        begin_on_future_base: (HELD, T, 0),
        restore: (HELD, T, 0),
        read_digest: ("", T, 0),
    },
}
MOVES = [
    pytest.param(state, event, *after, id=f"{state.__name__}-{event.__name__}")
    for state, events in TABLE.items()
    for event, after in events.items()
]


def test_the_table_has_every_event_of_every_state() -> None:
    outside = set(TABLE[committed])
    inside = set(TABLE[writing])
    assert set(TABLE) == set(STATES)
    assert {state: set(events) for state, events in TABLE.items()} == {
        state: inside if state in (staging, writing, torn_staging, torn_writing) else outside
        for state in STATES
    }


@pytest.mark.parametrize(("state", "event", "error", "after", "committed"), MOVES)
async def test_every_move(state: Any, event: Any, error: str, after: WeightState, committed: int) -> None:
    m = Machine()
    await state(m)
    m.check()
    before, was_held = m.policy.version, m.held
    assert await event(m) == error
    assert (m.policy.state, m.policy.version - before) == (after, committed)
    m.check()
    refused = error in (HELD, BASE) or event in (stage_out_of_order, read_digest)
    begun = event.__name__.startswith("begin") and not error
    assert m.held == (begun or (refused and was_held))
    assert m.engine.generating == (after in (C, S))


WALK = [name for event in dict.fromkeys(e for events in TABLE.values() for e in events) for name in [event]]


@given(st.lists(st.sampled_from(WALK), max_size=25))
def test_any_walk_keeps_the_promises(events: list[Any]) -> None:
    """Whatever comes in whatever order: the lease comes back, versions rise by one, nothing serves a mix."""

    async def walk() -> None:
        m = Machine()
        for event in events:
            if event in TABLE[committed] or (m.held and m.update is not None):
                before = m.policy.version
                await event(m)
                assert m.policy.version - before in (0, 1)
                m.check()
        if m.held and m.update is not None:
            await m.update.lose("over")
        m.trainer.alive = m.another.alive = False
        m.check()
        await restore(m)
        assert (m.policy.state, m.held, m.engine.generating) == (C, False, True)

    asyncio.run(walk())


# What breaks, and when.


async def in_place(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    return await update.commit(m.write())


async def in_place_aliased(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    m.write()
    return await update.commit()


async def staged(m: Machine) -> Any:
    update = await m.begin(in_place=False)
    return await update.commit(m.write())


async def restored(m: Machine) -> Any:
    assert not await restore(m)


async def lost(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    m.policy.rollouts._running["r"] = Track(added=True)
    m.tensors[0].fill_(-1.0)
    await update.lose("it died")


async def aborted(m: Machine) -> Any:
    update = await m.begin(in_place=True)
    await update.abort(untouched=True, reason="")


def errors() -> list[BaseException]:
    return [RuntimeError("secret"), TimeoutError(), Unavailable(Reason.ENGINE_DEAD, "dead")]


FAULTS = [
    # way, call that fails, state afterwards
    (in_place, "pause keep", C),
    (in_place, "tandem_reload", T),
    (in_place, "count", T),
    (in_place, "forget", T),  # what an older version left would be read with the new one
    (in_place_aliased, "tandem_reload", T),
    (staged, "pause keep", C),
    (staged, "tandem_reload", T),
    (staged, "count", T),
    (staged, "forget", T),
    (restored, "pause keep", C),
    (lost, "abort", T),
]


@pytest.mark.parametrize("error", errors(), ids=repr)
@pytest.mark.parametrize(("way", "call", "after"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)))
async def test_a_call_to_the_engine_that_fails(
    way: Any, call: str, after: WeightState, error: BaseException
) -> None:
    m = Machine(reloads=True)
    m.policy.rollouts._running["r"] = Track(added=True)
    m.engine.failing[call] = error
    if way is lost:
        await way(m)  # nobody is told: the trainer is gone
    else:
        with pytest.raises((type(error), AssertionError)):
            await way(m)
    assert (m.policy.state, m.policy.version, m.held) == (after, FIRST_VERSION, False)
    assert m.engine.generating == (after is C)
    assert "secret" not in m.policy.torn
    assert bool(m.policy.torn) == (after is T), "a reason without words is a reason too"
    m.check()
    m.engine.failing.clear()
    m.policy.rollouts._running.clear()
    assert await outcome(in_place(m)) == ""
    assert (m.policy.state, m.engine.generating) == (C, True)


@pytest.mark.parametrize("way", [in_place, staged])
async def test_memory_that_fails(way: Any) -> None:
    m = Machine()
    m.arenas.failing = MemoryError()
    with pytest.raises(MemoryError):
        await way(m)
    assert (m.policy.state, m.engine.generating, m.held) == (T, False, False)
    m.arenas.failing = None
    assert await outcome(way(m)) == ""
    m.check()


@pytest.mark.parametrize("at", ["pause keep", "resume", "tandem_reload"])
@pytest.mark.parametrize("way", [in_place, staged])
async def test_the_engine_dies(way: Any, at: str) -> None:
    m = Machine(reloads=True)
    reached, go_on = m.engine.hang(at)
    task = asyncio.ensure_future(outcome(way(m)))
    await asyncio.wait_for(reached.wait(), 5)
    m.engine.dead = True
    go_on.set()
    assert await task == Reason.ENGINE_DEAD
    assert not m.held
    assert (
        await outcome(m.begin(in_place=True)) == await outcome(m.begin(in_place=False)) == Reason.ENGINE_DEAD
    )
    assert not m.held


async def test_no_version_is_committed_on_a_dead_engine() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    m.write()
    m.engine.dead = True
    assert await outcome(update.commit()) == Reason.ENGINE_DEAD
    assert (m.policy.version, m.held) == (FIRST_VERSION, False)


CANCELLED = [
    # way, where the caller is cancelled, versions committed in spite of it, state afterwards
    (in_place, "pause keep", 0, C),
    (in_place, "pause wait", 0, C),
    (in_place, "tandem_reload", 1, C),
    (in_place, "resume", 1, C),
    (staged, "pause keep", 1, C),
    (staged, "tandem_reload", 1, C),
    (staged, "resume", 1, C),
    (restored, "pause keep", 0, C),
    (restored, "tandem_restore", 1, C),
    (lost, "abort", 0, T),
    (aborted, "resume", 0, C),
]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("way", "at", "versions", "after"), CANCELLED, ids=lambda x: getattr(x, "__name__", str(x))
)
async def test_the_caller_is_cancelled(
    way: Any, at: str, versions: int, after: WeightState, times: int
) -> None:
    m = Machine(reloads=True)
    reached, go_on = m.engine.hang(at)
    if at == "pause wait":
        m.engine.hanging["pause wait"] = m.engine.hanging.pop(at)
        task = asyncio.ensure_future(m.begin(in_place=True, in_flight="wait"))
    else:
        task = asyncio.ensure_future(way(m))
    await asyncio.wait_for(reached.wait(), 5)
    if at.startswith("pause") and way is not staged:
        m.engine.hang("resume")[1].set()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await free(m)
    assert (m.policy.state, m.policy.version) == (after, FIRST_VERSION + versions)
    assert m.engine.generating == (after is C)
    m.policy.rollouts._running.clear()
    m.check()


@pytest.mark.parametrize("work", ["stage", "write", "digest"])
async def test_a_commit_goes_on_in_its_thread_when_its_caller_is_cancelled(work: str) -> None:
    m = Machine()
    update = await m.begin(in_place=work == "digest")
    digest = m.write()
    reached, go_on = m.arenas.hang()
    task = asyncio.ensure_future(update.commit(digest))
    if work == "stage":  # before anything reached a thread
        await asyncio.sleep(0)
    else:
        assert await asyncio.to_thread(reached.wait, 5)
        assert m.policy.state is W
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert m.held
    assert await outcome(m.begin(in_place=True)) == HELD
    go_on.set()
    await free(m)
    assert (m.policy.state, m.policy.version) == (C, FIRST_VERSION + 1)
    m.check()


async def test_a_failed_pause_never_lets_a_torn_engine_run() -> None:
    """The engine forgets that a holder held it when that holder's second pause fails."""
    m = Machine()
    await torn(m)
    m.engine.failing["pause keep"] = RuntimeError("no")
    assert await outcome(in_place(m)) == "", "a torn engine is stopped already"
    await torn(m2 := Machine())
    m2.engine.hang("pause keep")
    task = asyncio.ensure_future(m2.begin(in_place=True))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert not m2.engine.generating


# Two at once.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
async def test_of_two_begins_at_once_one_has_the_lease(first: bool, second: bool) -> None:
    m = Machine()
    results = await asyncio.gather(outcome(m.begin(in_place=first)), outcome(m.begin(in_place=second)))
    assert results == ["", HELD]


async def test_a_begin_that_pauses_has_the_lease_and_the_old_version_is_whole() -> None:
    m = Machine()
    reached, go_on = m.engine.hang("pause wait")
    first = asyncio.ensure_future(m.begin(in_place=True, in_flight="wait"))
    await reached.wait()
    assert m.policy.state is C, "nobody may write yet"
    assert await outcome(m.begin(in_place=True)) == HELD
    assert await outcome(m.begin(in_place=False)) == HELD
    assert await outcome(m.policy.restore()) == HELD
    assert await outcome(m.policy.digest()) == ""
    go_on.set()
    await first
    assert m.policy.state is W


async def test_a_digest_is_of_one_version_or_refused() -> None:
    m = Machine()
    reached, go_on = m.arenas.hang()
    reading = asyncio.ensure_future(m.policy.digest())
    assert await asyncio.to_thread(reached.wait, 5)
    await in_place_aliased(m)
    go_on.set()
    with pytest.raises(Aborted, match="while they were read"):
        await reading
    assert await m.policy.digest() == combine(digest_tensors(m.values(2)))


async def test_a_digest_does_not_mind_what_is_staged_meanwhile() -> None:
    m = Machine()
    before = m.arenas.digest()
    reached, go_on = m.arenas.hang()
    reading = asyncio.ensure_future(m.policy.digest())
    assert await asyncio.to_thread(reached.wait, 5)
    await staging(m)
    m.write()
    go_on.set()
    assert await reading == before


# A trainer that lost its lease.


async def test_a_stray_trainer_keeps_others_away_until_it_ends_or_commits() -> None:
    m = Machine()
    await stray(m)
    with pytest.raises(Aborted, match="still has the weights' memory"):
        await m.policy.restore()
    m.trainer.alive = False
    assert await outcome(restored(m)) == ""
    again = Machine()
    await stray(again)
    assert await outcome(in_place(again)) == ""
    assert await outcome(restored(again)) == ""


async def test_a_trainer_that_gave_up_by_itself_is_not_stray() -> None:
    for give_up in (abort_touched, commit_with_a_wrong_digest):
        m = Machine()
        await writing(m)
        await give_up(m)
        assert m.policy.state is T
        assert await outcome(restored(m)) == ""


# Small print.


async def test_an_update_ends_once() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    await update.commit(m.write())
    for end in (update.commit(1), update.abort(untouched=True, reason=""), update.lose("")):
        with pytest.raises(RuntimeError, match="ends once"):
            await end
    assert m.policy.state is C


async def test_in_flight_modes_reach_the_engine_when_generation_stops() -> None:
    for in_place_, mode in ((True, "abort"), (False, "wait")):
        m = Machine()
        update = await m.begin(in_place=in_place_, in_flight=mode)
        assert m.engine.calls == (["pause abort"] if in_place_ else [])
        await update.commit(m.write())
        assert f"pause {mode}" in m.engine.calls


async def test_a_staged_update_stops_generation_only_to_copy() -> None:
    m = Machine()
    update = await m.begin(in_place=False)
    digest = m.write()
    assert m.engine.generating
    reached, go_on = m.arenas.hang()
    task = asyncio.ensure_future(update.commit(digest))
    assert await asyncio.to_thread(reached.wait, 5)
    assert (m.engine.generating, m.policy.state) == (False, W)
    go_on.set()
    assert await task == 2
    assert m.engine.generating


async def test_every_change_is_told() -> None:
    m = Machine()
    await in_place(m)
    await staged(m)
    await lost(m)
    assert m.seen == [(W, 1), (C, 2), (S, 2), (W, 2), (C, 3), (W, 3), (T, 3)]


async def test_a_commit_without_a_digest_is_for_updates_that_moved_nothing() -> None:
    m = Machine()
    update = await m.begin(in_place=False)
    m.write()
    assert await outcome(update.commit()) == Reason.FIELD_INVALID
    assert m.policy.state is C
    assert await outcome(in_place_aliased(m)) == ""


async def test_a_torn_reason_is_one_short_line_of_words() -> None:
    m = Machine()
    update = await m.begin(in_place=True)
    await update.lose("so\nlong " * 1000)
    assert len(m.policy.torn) <= 500
    assert "\n" not in m.policy.torn
    error = m.policy.torn_error()
    assert error.metadata == {"weight_version": "1"}
    assert error.message.endswith("a full update or RestoreCheckpoint heals them")


async def test_weights_that_are_not_in_arenas_are_neither_restored_nor_read() -> None:
    m = Machine()
    m.arenas.reason = "quantized"
    for call in (m.policy.restore(), m.policy.digest()):
        with pytest.raises(FailedPrecondition, match="quantized"):
            await call
    assert (m.policy.state, m.held) == (C, False)


async def test_updates_and_failures_are_counted() -> None:
    m = Machine()
    await in_place(m)
    await staged(m)
    update = await m.begin(in_place=False)
    await update.lose("")
    await aborted(m)
    assert (m.policy.committed, m.policy.failed) == (2, 2)


@pytest.mark.parametrize("in_place", [True, False])
async def test_an_update_may_number_its_version(in_place: bool) -> None:
    """As a run's trainer does with an engine that was started again."""
    m = Machine()
    values = m.values(7)
    update = await m.begin(in_place=in_place, new_version=7)
    if in_place:
        for place, value in zip(m.tensors, values, strict=True):
            place.copy_(value)
    else:
        for i, value in enumerate(values):
            update.chunk(i, 0, value.numpy().tobytes())
    assert await update.commit(combine(digest_tensors(values))) == m.policy.version == 7
    for wrong in (7, 0, 2**63):
        with pytest.raises(InvalidArgument, match=r"begin\.new_version: must be above the base version 7"):
            await m.begin(in_place, new_version=wrong)
    assert not m.held


async def test_a_begin_that_is_cancelled_before_its_pause_has_its_turn_waits_for_none() -> None:
    m = Machine()
    reached, _ = m.engine.hang("pause keep")
    task = asyncio.ensure_future(m.begin(in_place=True))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)
    assert not m.held
    assert "resume" not in m.engine.calls, "a pause that was given up holds nothing"


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    m = Machine()
    servicer = WeightServicer(SimpleNamespace(policy=m.policy), 2.0, 1024)  # type: ignore[arg-type]
    before = list(m.policy.changed)
    watching = servicer.WatchWeightVersion(weights_pb2.WatchWeightVersionRequest(), None)
    assert (await anext(watching)).weight_version == m.policy.version
    assert len(m.policy.changed) == len(before) + 1
    await watching.aclose()  # type: ignore[attr-defined]
    assert m.policy.changed == before
