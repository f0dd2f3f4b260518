"""Each way in which an update's bytes reach the engine: what it leaves when it commits, and when it breaks.

The engine is a stand-in that fails when told to. Memory, placements and digests are real.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from inference_service.policy import WeightState
from inference_service.staging import Staging
from inference_service.transports import sparse as sparse_module
from tandem.errors import DataLoss, FailedPrecondition, Reason, Unavailable
from tests.policy_machine import Engine
from tests.update_plane import STAGED, C, Plane, S, T, W, digest_of, random_bits, reason, ways
from weight_transfer.arena import Arena

pytestmark = pytest.mark.usefixtures("quiet")


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


@pytest.mark.parametrize("free", [1 << 40, 0])
async def test_tensors_that_came_whole_among_changes_are_put_back_if_there_is_memory_for_them(
    monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(sparse_module, "free_bytes", lambda: free)
    plane = Plane(reloads=True)
    update, new = await plane.begin("sparse staged"), random_bits(2)
    for i, value in enumerate(new[:2]):
        update.chunk(i, 0, value.reshape(-1).view(torch.uint8).numpy().tobytes())
    for packed in plane.packed(new):
        if packed.tensor > 1:
            update.changes(packed)
    fails_once(plane.engine, "tandem_reload")
    assert await reason(update.commit(digest_of(new))) == Reason.INTERRUPTED
    plane.check(C if free else T, 1, plane.values)


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


# Memory.


def pages(arena: Arena) -> int:
    """Bytes of it that take memory."""
    import os

    return os.fstat(arena.fd).st_blocks * 512


@pytest.mark.parametrize("end", ["commit", "lose"])
@pytest.mark.parametrize("name", ["stream staged", "shared staged"])
async def test_generation_and_the_service_go_on_while_staged_memory_is_given_back(
    name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To give gigabytes back takes a second, in which the lease is held."""
    plane, new = Plane(), random_bits(2)
    seen: list[tuple[bool, WeightState, int]] = []
    giving, given = asyncio.Event(), threading.Event()
    loop, forget = asyncio.get_running_loop(), Staging.forget

    def slowly(stage: Staging) -> None:
        loop.call_soon_threadsafe(giving.set)
        assert given.wait(10), "the service stood still"
        forget(stage)

    monkeypatch.setattr(Staging, "forget", slowly)
    update = await plane.begin(name)
    plane.bring(update, name, new)
    ending = asyncio.ensure_future(
        update.commit(digest_of(new)) if end == "commit" else update.lose("it died")
    )
    await giving.wait()
    seen.append((plane.engine.generating, plane.policy.state, plane.policy.version))
    assert await reason(plane.begin("stream staged")) == Reason.LEASE_HELD
    given.set()
    monkeypatch.setattr(Staging, "forget", forget)
    await ending
    version = 2 if end == "commit" else 1
    assert seen == [(True, S, version)]
    plane.check(C, version, new if end == "commit" else plane.values)


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
