"""Each way in which an update's bytes reach the engine: what it leaves when it commits, and when it breaks.

The engine is a stand-in that fails when told to. Memory, placements and digests are real.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from inference_service.arenas import HostArenas
from inference_service.device_arenas import DeviceArenas
from inference_service.memory import free_bytes
from inference_service.modes import HEADROOM, Modes
from inference_service.policy import Policy, WeightState
from inference_service.staging import MappedStaging
from inference_service.transports import SHARED, STREAM, Way, incoming
from inference_service.transports import sparse as sparse_module
from inference_service.update import Update
from tandem.errors import DataLoss, FailedPrecondition, InvalidArgument, Reason, TandemError, Unavailable
from tests.unit.test_policy import Engine
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.sparse import Changes, Packed, bits, changed, pack

SPECS = (
    TensorSpec("a", "float32", (3, 4)),
    TensorSpec("b", "bfloat16", (4, 6)),  # in two pieces, the second half first
    TensorSpec("c", "float16", (1000,)),
    TensorSpec("empty", "float32", (0, 4)),
    TensorSpec("scalar", "bfloat16", ()),
)
LIMIT = 64  # bytes of a chunk
C, S, W, T = WeightState


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def random_bits(seed: int) -> list[torch.Tensor]:
    """Tensors of any bits: infinities, and NaNs with payloads."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in SPECS:
        raw = torch.randint(0, 256, (spec.nbytes,), generator=generator, dtype=torch.uint8)
        made.append(raw.view(getattr(torch, spec.dtype)).reshape(spec.shape))
    return made


def digest_of(tensors: list[torch.Tensor]) -> int:
    return combine(digest_tensors(tensors))


class Plane:
    """A policy, of which the engine and the trainer hold version 1 alike."""

    def __init__(self, reloads: bool = False) -> None:
        placements, offset = [], 0
        for spec in SPECS:
            strides = contiguous_strides(spec.shape)
            blocks: tuple[Block, ...] = (Block(0, offset, strides, 0, strides, spec.shape),)
            if spec.name == "b":
                half = (2, 6)
                blocks = (
                    Block(0, offset + 24, strides, 0, strides, half),
                    Block(0, offset, strides, 12, strides, half),
                )
            placements.append(Placement(spec, blocks))
            offset += 4096
        self.arenas = HostArenas([Arena.create("test", offset)], placements, reloads)
        self.engine = Engine()
        self.policy = Policy(self.engine, self.arenas)  # type: ignore[arg-type]
        self.values = random_bits(1)
        self.arenas.write(self.values)
        self.stage = MappedStaging(self.arenas.manifest)

    def way(self, name: str) -> Way:
        transport, _, how = name.partition(" ")
        return Way(
            STREAM if transport == "sparse" else transport,
            in_place=how == "in place",
            partial=transport == "sparse",
            stage=self.stage if name == "shared staged" else None,
        )

    async def begin(self, name: str) -> Update:
        return await self.policy.begin(self.policy.version, self.way(name))

    def bring(self, update: Update, name: str, new: list[torch.Tensor]) -> None:
        """Have the bytes of `new` reach the update, as its trainer would."""
        if name == "shared in place":
            self.arenas.write(new)
        elif name == "shared staged":
            for value, place in zip(new, self.stage.complete(), strict=True):
                place.copy_(value)
        elif name.startswith("sparse"):
            for packed in self.packed(new):
                update.changes(packed)
        else:
            for i, value in enumerate(new):
                raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
                for start in range(0, len(raw), LIMIT):
                    update.chunk(i, start, raw[start : start + LIMIT])

    def packed(self, new: list[torch.Tensor]) -> Iterator[Packed]:
        for i, (now, before) in enumerate(zip(new, self.values, strict=True)):
            where = changed(bits(now), bits(before))
            yield from pack(Changes(i, where, bits(now)[where]), LIMIT)

    @property
    def digest(self) -> int:
        """Of what the engine computes with."""
        return self.arenas.digest()

    def check(self, state: WeightState, version: int, values: list[torch.Tensor]) -> None:
        assert (self.policy.state, self.policy.version) == (state, version)
        assert self.policy._update is None
        assert self.engine.generating == (state is C)
        if state is C:
            assert self.digest == digest_of(values)


WAYS = [
    "stream staged",
    "stream in place",
    "shared staged",
    "shared in place",
    "sparse staged",
    "sparse in place",
]
STAGED = [name for name in WAYS if name.endswith("staged")]
ways = pytest.mark.parametrize("name", WAYS)


async def reason(move: Any) -> str:
    """ "" or the reason of the error."""
    try:
        async with asyncio.timeout(30):
            await move
    except TandemError as error:
        return str(error.reason)
    return ""


@ways
async def test_an_update_brings_the_bits(name: str) -> None:
    plane = Plane()
    for version in (2, 3):
        new = random_bits(version)
        update = await plane.begin(name)
        assert (plane.policy.state, plane.engine.generating) == ((S, True) if name in STAGED else (W, False))
        plane.bring(update, name, new)
        if name in STAGED:
            assert plane.digest == digest_of(plane.values), "staged bytes are beside the live weights"
        assert await update.commit(digest_of(new)) == version
        plane.values = new
        plane.check(C, version, new)


@ways
@pytest.mark.parametrize("how", ["digest", "lost", "aborted"])
async def test_what_breaks_before_its_commit(name: str, how: str) -> None:
    """Staged, the old version serves; in place, nothing does, until a whole update heals it."""
    plane = Plane()
    update, new = await plane.begin(name), random_bits(2)
    plane.bring(update, name, new)
    if how == "digest":
        assert await reason(update.commit(digest_of(new) ^ 1)) == Reason.DIGEST_MISMATCH
    elif how == "lost":
        assert await reason(update.lose("the trainer died")) == ""
    else:
        # Of what it streamed the service knows itself: a trainer that says it touched nothing is not believed.
        said = await reason(update.abort(untouched=name != "shared in place", reason="changed my mind"))
        assert said == ("" if name in STAGED else Reason.ENGINE_TORN)
    plane.check(C if name in STAGED else T, 1, plane.values)
    if name not in STAGED:
        assert await reason(plane.begin("sparse staged")) == Reason.ENGINE_TORN, "it would heal nothing"
        assert await reason(plane.begin("sparse in place")) == Reason.ENGINE_TORN
    healing = await plane.begin("stream staged")
    plane.bring(healing, "stream staged", new)
    assert await healing.commit(digest_of(new)) == 2
    plane.check(C, 2, new)


@pytest.mark.parametrize("how", ["abort", "lose", "abort touched"])
@pytest.mark.parametrize("name", ["stream in place", "sparse in place"])
async def test_an_update_in_place_that_got_nothing_leaves_the_engine_whole(name: str, how: str) -> None:
    """The service alone writes, and knows: whatever the trainer says."""
    plane = Plane()
    update = await plane.begin(name)
    end = update.lose("it died") if how == "lose" else update.abort(untouched=how == "abort", reason="")
    assert await reason(end) == ""
    plane.check(C, 1, plane.values)


@pytest.mark.parametrize("call", ["pause keep", "tandem_reload", "count"])
@pytest.mark.parametrize("name", STAGED)
async def test_a_commit_that_fails_while_it_installs(name: str, call: str) -> None:
    """What the elements of a sparse one replaced is kept, and put back."""
    from inference_service.rollouts import Track

    plane = Plane(reloads=True)
    plane.policy.rollouts._running["r"] = Track(added=True)
    update, new = await plane.begin(name), random_bits(2)
    plane.bring(update, name, new)
    fails_once(plane.engine, call)
    assert await reason(update.commit(digest_of(new))) == Reason.INTERRUPTED
    whole = call == "pause keep" or name == "sparse staged"
    plane.check(C if whole else T, 1, plane.values)
    if name == "sparse staged" and call != "pause keep":
        assert plane.engine.calls.count("tandem_reload") == 2, "what vLLM alone can place was put back too"


def fails_once(engine: Engine, call: str) -> None:
    error = Unavailable(Reason.INTERRUPTED, "once")
    if call == "count":

        def count(request_id: str) -> int:
            raise error

        engine.tokens_so_far = count  # type: ignore[method-assign]
        return
    step = engine.step

    async def failing(name: str) -> None:
        if name == call:
            engine.step = step  # type: ignore[method-assign]
            engine.calls.append(name)
            raise error
        await step(name)

    engine.step = failing  # type: ignore[method-assign]


async def test_a_sparse_commit_that_cannot_be_undone_tears(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = Plane(reloads=True)
    update, new = await plane.begin("sparse staged"), random_bits(2)
    plane.bring(update, "sparse staged", new)
    plane.engine.failing["tandem_reload"] = Unavailable(Reason.INTERRUPTED, "always")
    assert await reason(update.commit(digest_of(new))) == Reason.INTERRUPTED
    plane.check(T, 1, plane.values)


async def test_memory_that_fails_while_a_sparse_update_is_applied_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plane = Plane()
    update, new = await plane.begin("sparse staged"), random_bits(2)
    plane.bring(update, "sparse staged", new)
    copies = []

    def copy(pairs: Any) -> None:
        copies.append(pairs)
        if len(copies) == 2:  # of the tensor in pieces, behind others
            raise MemoryError
        real(pairs)

    real = sparse_module.copy
    monkeypatch.setattr(sparse_module, "copy", copy)
    with pytest.raises(MemoryError):
        await update.commit(digest_of(new))
    assert len(copies) > 2
    plane.check(C, 1, plane.values)


# Prepared, and then committed or not.


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("end", ["commit", "abort", "lose"])
async def test_a_prepared_update(name: str, end: str) -> None:
    plane = Plane()
    update, new = await plane.begin(name), random_bits(2)
    plane.bring(update, name, new)
    await update.prepare(digest_of(new))
    assert (plane.policy.state, plane.engine.generating, plane.digest) == (S, True, digest_of(plane.values))
    for late in (lambda: update.chunk(0, 0, b"1234"), lambda: update.changes(next(plane.packed(new)))):
        with pytest.raises(FailedPrecondition, match="nothing moves any more"):
            late()
    assert await reason(update.prepare(digest_of(new))) == Reason.UPDATE_ORDER
    if end == "commit":
        assert await update.commit() == 2
        plane.check(C, 2, new)
        return
    await (update.abort(untouched=True, reason="") if end == "abort" else update.lose("the trainer died"))
    plane.check(C, 1, plane.values)


@pytest.mark.parametrize("name", STAGED)
async def test_what_is_wrong_is_told_when_it_is_prepared(name: str) -> None:
    plane = Plane()
    update, new = await plane.begin(name), random_bits(2)
    plane.bring(update, name, new)
    with pytest.raises(DataLoss):
        await update.prepare(digest_of(new) ^ 1)
    await update.lose("a wrong digest")
    plane.check(C, 1, plane.values)


async def test_an_update_in_place_is_not_prepared() -> None:
    plane = Plane()
    update = await plane.begin("stream in place")
    assert await reason(update.prepare(1)) == Reason.UPDATE_ORDER
    await update.lose("out of order")


async def test_a_trainer_that_is_lost_while_its_update_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reads the staged bytes is done before they are given back."""
    plane = Plane()
    update, new = await plane.begin("stream staged"), random_bits(2)
    plane.bring(update, "stream staged", new)
    reached, go_on = asyncio.Event(), asyncio.Event()
    check = update._incoming.check

    async def slow(digest: int | None) -> None:
        reached.set()
        await go_on.wait()
        await check(digest)

    monkeypatch.setattr(update._incoming, "check", slow)
    preparing = asyncio.ensure_future(update.prepare(digest_of(new)))
    await reached.wait()
    preparing.cancel()
    losing = asyncio.ensure_future(update.lose("the trainer died"))
    await asyncio.sleep(0)
    assert plane.policy.state is S
    go_on.set()
    await losing
    plane.check(C, 1, plane.values)


# What is refused before anything changes.


def wrong(change: Callable[[Packed], Packed]) -> Any:
    return lambda plane: change(next(plane.packed(random_bits(2))))


REFUSED: dict[str, tuple[Any, str]] = {
    "no such tensor": (wrong(lambda p: dataclasses.replace(p, tensor=99)), "has 5 tensors, not 100"),
    "no elements": (wrong(lambda p: dataclasses.replace(p, count=0)), "no elements"),
    "gaps of three bytes": (wrong(lambda p: dataclasses.replace(p, gap_bytes=3)), "not 3"),
    "beyond the tensor": (wrong(lambda p: dataclasses.replace(p, first=p.first + 12)), "has 12 elements"),
    "far beyond": (wrong(lambda p: dataclasses.replace(p, first=2**64 - 1)), "has 12 elements"),
    "too few bytes": (
        wrong(lambda p: dataclasses.replace(p, compressed=False, data=p.data[:-1])),
        "it has",
    ),
    "more than is allowed": (wrong(lambda p: dataclasses.replace(p, count=1 << 30)), "the limit is"),
    "not zstd": (wrong(lambda p: dataclasses.replace(p, compressed=True, data=b"nonsense")), "not zstd's"),
}


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
async def test_elements_that_are_none(name: str, make: Any, said: str) -> None:
    plane = Plane()
    update = await plane.begin(name)
    with pytest.raises(InvalidArgument, match=said):
        update.changes(make(plane))
    assert plane.digest == digest_of(plane.values)
    assert await reason(update.abort(untouched=True, reason="")) == ""
    plane.check(C, 1, plane.values)


def test_a_frame_that_lies_about_its_size_costs_no_memory() -> None:
    import zstandard

    from weight_transfer.sparse import unpack

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(ValueError, match="does not unpack to 2 bytes"):
        unpack(Packed(0, 0, 1, 1, True, bomb), 10, 2, 1 << 20)


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
async def test_elements_and_whole_tensors_do_not_mix_in_one_tensor(name: str) -> None:
    plane, new = Plane(), random_bits(2)
    first, *_ = plane.packed(new)
    update = await plane.begin(name)
    update.changes(first)
    with pytest.raises(FailedPrecondition, match="it comes whole, and in elements too"):
        update.chunk(0, 0, b"1234")
    with pytest.raises(FailedPrecondition, match="comes after"):
        update.changes(first)
    await update.lose("out of order")
    plane = Plane()
    update = await plane.begin(name)
    update.chunk(0, 0, b"1234")
    with pytest.raises(FailedPrecondition, match="it comes whole, and in elements too"):
        update.changes(first)
    assert await reason(update.commit(1)) == Reason.UPDATE_ORDER, "and not half of it"


@pytest.mark.parametrize("name", ["sparse staged", "sparse in place"])
async def test_a_partial_update_may_carry_whole_tensors(name: str) -> None:
    plane, new = Plane(), random_bits(2)
    new[2], new[4] = plane.values[2], plane.values[4]  # these do not come at all
    update = await plane.begin(name)
    for i in (0, 1):
        raw = new[i].reshape(-1).view(torch.uint8).numpy().tobytes()
        update.chunk(i, 0, raw[:8])
        update.chunk(i, 8, raw[8:])
    assert await update.commit(digest_of(new)) == 2
    plane.check(C, 2, new)


@pytest.mark.parametrize("name", ["stream staged", "stream in place", "shared staged"])
async def test_elements_belong_to_partial_updates(name: str) -> None:
    plane = Plane()
    update = await plane.begin(name)
    with pytest.raises(FailedPrecondition, match="belong to partial updates"):
        update.changes(next(plane.packed(random_bits(2))))
    await update.abort(untouched=True, reason="")


# Memory.


def pages(arena: Arena) -> int:
    """Bytes of it that take memory."""
    import os

    return os.fstat(arena.fd).st_blocks * 512


async def test_a_stage_that_is_mapped_gives_its_pages_back() -> None:
    plane = Plane()
    new, mapped = random_bits(2), Arena.open(plane.stage.arena.fd, plane.stage.arena.size)
    for end in ("commit", "lose"):
        update = await plane.begin("shared staged")
        plane.bring(update, "shared staged", new)
        assert pages(plane.stage.arena) > 0
        await (update.commit(digest_of(new)) if end == "commit" else update.lose("it died"))
        assert pages(plane.stage.arena) == 0
        assert not mapped.tensor(0, (mapped.size,), torch.uint8).any(), (
            "the trainer's mapping is of the same memory"
        )


# Which way is chosen.


@pytest.mark.parametrize(
    ("setting", "transport", "asked", "mode"),
    [
        ("auto", SHARED, "", "in_place"),
        ("auto", STREAM, "", ""),
        ("staged", SHARED, "", "staged"),
        ("in_place", STREAM, "", "in_place"),
        ("staged", SHARED, "in_place", "in_place"),
        ("in_place", STREAM, "staged", "staged"),
    ],
)
def test_the_trainer_chooses_and_then_the_service(
    setting: Any, transport: str, asked: str, mode: str
) -> None:
    assert Modes(Plane().arenas, setting).for_session(transport, asked) == mode


def test_what_is_not_chosen_depends_on_free_memory() -> None:
    arenas, free = Plane().arenas, [0]
    modes = Modes(arenas, free=lambda: free[0])
    need = arenas.manifest.nbytes + HEADROOM
    for free[0], in_place in ((0, True), (need - 1, True), (need, False)):
        assert modes.in_place("") is in_place
        assert modes.in_place("staged") is False
        assert modes.in_place("in_place") is True


def test_what_streams_to_a_gpu_or_is_an_adapter_is_staged() -> None:
    arenas = DeviceArenas(None, [], Plane().arenas.placements)  # type: ignore[arg-type]
    for modes, adapter in ((Modes(arenas, "in_place"), False), (Modes(Plane().arenas, "in_place"), True)):
        assert modes.for_session(STREAM, adapter=adapter) == "staged"
        with pytest.raises(FailedPrecondition) as caught:
            modes.for_session(STREAM, "in_place", adapter=adapter)
        assert caught.value.reason == Reason.TRANSPORT_UNAVAILABLE
    with pytest.raises(ValueError, match="come like this"):
        incoming(Way(STREAM, in_place=True), arenas, None)  # type: ignore[arg-type]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    host = free_bytes(tmp_path)  # no limits there
    assert host > 0
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    for limit, free in (("1000\n", 350), ("600\n", 0), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        found = free_bytes(tmp_path)
        assert found == free if free is not None else found > 1000
