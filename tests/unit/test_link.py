"""The line between the service and the thread that receives in a worker, over a real socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from inference_service import worker_link
from inference_service.link import SILENT_S, Link
from inference_service.receiving import Receiving
from inference_service.transports.nccl import Invitation, OverNccl
from inference_service.worker_link import WorkerLink
from tandem.errors import Aborted, DataLoss, Reason
from tests.weight_service import engine_arenas, network
from weight_transfer.cuda import nccl


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Orders:
    """What a worker is told to do, done as a test says."""

    def __init__(self, pulse: Callable[[], None]) -> None:
        self.pulse = pulse
        self.done: list[str] = []
        self.does: Callable[[], dict[str, Any]] = dict

    def join(self, id: bytes, *, staged: bool, window: int) -> dict[str, Any]:
        self.done.append("join")
        return self.does()

    def receive(self, *, staged: bool, window: int) -> dict[str, Any]:
        self.done.append("receive")
        return self.does()

    def rest(self) -> None:
        self.done.append("rest")

    def drop(self) -> None:
        self.done.append("drop")

    def install(self) -> dict[str, Any]:
        self.done.append("install")
        return {}

    def leave(self) -> None:
        self.done.append("leave")

    def close(self) -> None:
        self.done.append("close")


class Worker:
    """An engine with one worker."""

    def __init__(self) -> None:
        arenas = engine_arenas(network())
        self.held: Any = SimpleNamespace(arenas=arenas.arenas, placements=arenas.placements)
        self.links: list[WorkerLink] = []

    async def call_workers(self, method: str, path: str) -> None:
        assert method == "tandem_link"
        self.links.append(WorkerLink(self.held, path, self.links[-1] if self.links else None))

    @property
    def orders(self) -> Any:
        return self.links[-1]._receiving


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(worker_link, "Receiving", lambda held, pulse, crew: Orders(pulse))
    return Worker()


@pytest.fixture
async def link(worker: Worker) -> AsyncIterator[Link]:
    link = Link(worker)  # type: ignore[arg-type]
    await link.open()
    yield link
    link.close()
    for ended in worker.links:
        await asyncio.to_thread(ended._thread.join, 10)
        assert not ended._thread.is_alive(), "the line's end is the thread's"
        assert "close" in ended._receiving.done  # type: ignore[attr-defined]


def works(orders: Orders, over: threading.Event) -> dict[str, Any]:
    while not over.wait(0.01):
        orders.pulse()
    return {"digest": "1f"}


async def test_orders_are_answered_in_turn(link: Link, worker: Worker) -> None:
    worker.orders.does = lambda: {"digest": "1f"}
    first, second = (
        link.order("join", id="", staged=True, window=64),
        link.order("receive", staged=True, window=64),
    )
    assert (await link.answered(second))["digest"] == "1f"
    assert first.done()
    assert worker.orders.done == ["join", "receive"]


async def test_one_that_works_for_long_says_that_it_is_there(link: Link, worker: Worker) -> None:
    over = threading.Event()
    worker.orders.does = lambda: works(worker.orders, over)
    answer = link.order("receive", staged=False, window=64)
    waiting = asyncio.ensure_future(link.answered(answer))
    await asyncio.sleep(SILENT_S + 0.5)
    assert not waiting.done()
    over.set()
    assert (await waiting)["digest"] == "1f"


async def test_one_that_says_nothing_is_given_up_and_another_may_come(link: Link, worker: Worker) -> None:
    stuck, hung = threading.Event(), worker.orders
    hung.does = lambda: {"late": stuck.wait(10)}
    began = time.monotonic()
    with pytest.raises(Aborted, match="nothing was heard") as lost:
        await link.answered(link.order("receive", staged=False, window=64))
    assert lost.value.reason == Reason.LEASE_LOST
    assert SILENT_S <= time.monotonic() - began < SILENT_S + 4
    opening = asyncio.ensure_future(link.open())
    await asyncio.sleep(0.2)
    assert "close" not in hung.done, "the new one waits until the last has given back what it has"
    stuck.set()
    await opening
    await link.answered(link.order("join", id="", staged=False, window=64))
    assert "close" in hung.done
    assert worker.orders.done == ["join"]


async def test_what_is_taken_back_ends(link: Link, worker: Worker) -> None:
    worker.orders.does = lambda: works(worker.orders, threading.Event())
    waiting = asyncio.ensure_future(link.answered(link.order("receive", staged=False, window=64)))
    await asyncio.sleep(0.1)
    link.order("join", id="", staged=False, window=64)  # was sent before, and is taken back too
    link.abort()
    with pytest.raises(Aborted, match="the update has ended"):
        await waiting
    worker.orders.does = dict
    await link.answered(link.order("join", id="", staged=False, window=64))
    assert worker.orders.done == ["receive", "leave", "join"]


async def test_an_order_that_fails_is_told_with_the_workers_words(link: Link, worker: Worker) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("cuMemCreate: out of memory")

    worker.orders.does = fails
    with pytest.raises(Aborted, match="RuntimeError: cuMemCreate: out of memory"):
        await link.answered(link.order("join", id="", staged=True, window=64))
    assert worker.orders.done == ["join", "leave"]


async def test_memory_that_only_updates_need_goes_back_when_none_comes(
    link: Link, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_link, "_IDLE_S", 0.05)
    await link.answered(link.order("join", id="", staged=True, window=64))
    async with asyncio.timeout(5):
        while "rest" not in worker.orders.done:  # noqa: ASYNC110  # it happens in a thread
            await asyncio.sleep(0.01)


async def test_an_order_that_fails_in_the_system_is_told_as_any_other(link: Link, worker: Worker) -> None:
    def fails() -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", "arena")

    worker.orders.does = fails
    with pytest.raises(Aborted, match=r"PermissionError: \[Errno 13\] Permission denied"):
        await link.answered(link.order("join", id="", staged=True, window=64))
    worker.orders.does = dict
    await link.answered(link.order("join", id="", staged=True, window=64))
    assert worker.orders.done == ["join", "leave", "join"]


async def test_what_will_not_be_installed_is_dropped_without_an_answer(link: Link, worker: Worker) -> None:
    link.drop()
    await link.answered(link.order("join", id="", staged=True, window=64))
    assert worker.orders.done == ["drop", "join"]


@pytest.mark.parametrize("ends", ["installed", "given up"])
async def test_what_was_staged_whole_is_installed_or_dropped(link: Link, worker: Worker, ends: str) -> None:
    worker.orders.does = lambda: {"digest": "1f"}
    incoming = OverNccl(Invitation(link, "s", bytes(128), 64, pytest.fail), in_place=False, partial=False)
    await incoming.open()
    incoming.expect()
    await incoming.arrived()
    await incoming.check(0x1F)
    if ends == "installed":
        await incoming.install()
    incoming.release()
    await link.answered(link.order("join", id="", staged=True, window=64))
    last = "install" if ends == "installed" else "drop"
    assert worker.orders.done == ["join", "receive", last, "join"]


async def test_a_worker_that_prepares_for_long_says_that_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one does for thousands of experts on several GPUs."""
    made, worker = Receiving._made, Worker()

    def slowly(receiving: Receiving, arenas: Any, window: int) -> Any:
        time.sleep(SILENT_S + 0.5)
        return made(receiving, arenas, window)

    monkeypatch.setattr(Receiving, "_made", slowly)
    monkeypatch.setattr(nccl, "Communicator", lambda *_: SimpleNamespace(abort=lambda: None))
    link = Link(worker)  # type: ignore[arg-type]
    await link.open()
    await link.answered(link.order("join", id="00" * 128, staged=False, window=64))
    link.close()
    await asyncio.to_thread(worker.links[-1]._thread.join, 10)


async def test_without_a_worker_nothing_is_waited_for(worker: Worker) -> None:
    link = Link(worker)  # type: ignore[arg-type]
    with pytest.raises(Aborted, match="not connected"):
        await link.answered(link.order("receive", staged=False, window=64))
    link.abort()


class Workers(Worker):
    """An engine with two."""

    async def call_workers(self, method: str, path: str, ranks: int, specs: Any) -> None:  # type: ignore[override]
        assert (method, ranks) == ("tandem_link", 3)
        assert [name for name, _, _ in specs] == [spec.name for spec in MANIFEST]
        before = self.links[-2:] or [None, None]
        self.links += [WorkerLink(self.held, path, link) for link in before]


MANIFEST = engine_arenas(network()).manifest


@pytest.fixture
async def two(worker: Worker) -> AsyncIterator[tuple[Link, list[Any]]]:
    workers = Workers()
    link = Link(workers, 2, MANIFEST)  # type: ignore[arg-type]
    await link.open()
    yield link, [line._receiving for line in workers.links]
    link.close()
    for ended in workers.links:
        await asyncio.to_thread(ended._thread.join, 10)
        assert not ended._thread.is_alive()


async def test_two_workers_have_answered_when_both_have(two: tuple[Link, list[Any]]) -> None:
    link, (one, other) = two
    over = threading.Event()
    one.does = lambda: {"digest": "1f"}
    other.does = lambda: works(other, over)
    answer = asyncio.ensure_future(link.answered(link.order("receive", staged=True, window=64)))
    await asyncio.sleep(0.2)
    assert not answer.done()
    over.set()
    assert (await answer)["digest"] == "1f"


async def test_two_workers_that_got_different_bytes_are_told_apart(two: tuple[Link, list[Any]]) -> None:
    link, (one, other) = two
    one.does, other.does = lambda: {"digest": "1f"}, lambda: {"digest": "20"}
    with pytest.raises(DataLoss, match="do not agree") as lost:
        await link.answered(link.order("receive", staged=True, window=64))
    assert lost.value.reason == Reason.DIGEST_MISMATCH


async def test_what_one_of_two_workers_cannot_the_other_gives_up(two: tuple[Link, list[Any]]) -> None:
    link, (one, other) = two

    def fails() -> dict[str, Any]:
        raise RuntimeError("cuMemCreate: out of memory")

    one.does, other.does = fails, lambda: works(other, threading.Event())
    with pytest.raises(Aborted, match="out of memory"):
        await link.answered(link.order("join", id="", staged=True, window=64))
    link.abort()  # as the update does that it is of
    one.does = other.does = dict
    await link.answered(link.order("join", id="", staged=True, window=64))
    assert other.done == ["join", "leave", "join"]


async def test_one_of_two_workers_that_says_nothing_is_enough(two: tuple[Link, list[Any]]) -> None:
    link, (one, other) = two
    stuck = threading.Event()
    one.does, other.does = dict, lambda: {"late": stuck.wait(10)}
    began = time.monotonic()
    with pytest.raises(Aborted, match="nothing was heard"):
        await link.answered(link.order("receive", staged=False, window=64))
    assert time.monotonic() - began < SILENT_S + 4
    stuck.set()
