"""What takes NCCL's place in tests without a GPU: ranks that meet on a Unix socket, and bytes of host memory.

As with NCCL, a rank that joined and then goes away is not noticed by the other: it waits until it is told to stop. All
that is ours (windows, mirrors, buckets, the line to the worker, deadlines, the policy's states) is the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from inference_service import sessions
from inference_service.arenas import EngineArenas, Handle, HostArenas
from inference_service.device_arenas import DeviceArenas
from inference_service.staging import taken, unstage
from inference_service.worker_link import WorkerLink
from tests.weight_service import IdleEngine, engine_arenas, network
from trainer_service import session
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.weights import PolicyWeights
from weight_transfer.cuda import nccl
from weight_transfer.digest import combine
from weight_transfer.reading import Reading
from weight_transfer.transports import Sum
from weight_transfer.transports.nccl import NcclTransport

ENGINE_GPU = "GPU-engine"
WINDOW_BYTES = 64
_POLL_S = 0.001

_for_good = contextlib.ExitStack()


def sending(window: int) -> None:
    """Called by the trainer's rank before it is told to send each window: for tests to put another in its place."""


def carried(window: int, memory: memoryview) -> memoryview:
    """What the wire makes of a part of a window, as it goes: for tests to put another in its place."""
    return memory


def unique_id() -> bytes:
    """The name of a socket that is not there yet, and leaves no file."""
    return f"\0tdn-{uuid.uuid4().hex}".encode().ljust(nccl.ID_BYTES, b"\0")


def carried_to(worker: int, memory: memoryview) -> memoryview:
    """What the wire makes of it on its way to one worker, counted from 0."""
    return memory


class HostCommunicator:
    """Rank 0 listens, the others connect. What it is told to send goes by itself, as a GPU does it."""

    def __init__(
        self,
        id: bytes,
        rank: int,
        size: int,
        device: torch.device,
        check: Callable[[], None],
        *,
        join_s: float = nccl.JOIN_S,
    ) -> None:
        path = id.rstrip(b"\0").decode()
        self._rank, self._size, self._check = rank, size, check
        self._lines: list[socket.socket] = []
        self._aborted = False
        self._queue: queue.SimpleQueue[tuple[int, Sequence[nccl.Span], threading.Event]] = queue.SimpleQueue()
        self._windows = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            if rank == 0:
                listener.bind(path)
                listener.listen(size)
                listener.setblocking(False)
            self._until(lambda: self._meet(listener, path), join_s, "the other side did not join")
        if rank == 0:
            threading.Thread(target=self._send, name="host-nccl", daemon=True).start()

    def _meet(self, listener: socket.socket, path: str) -> bool:
        if self._rank == 0:
            with contextlib.suppress(BlockingIOError):
                self._lines.append(listener.accept()[0])
                self._lines[-1].setblocking(False)
            return len(self._lines) == self._size - 1
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            line.connect(path)
        except OSError:
            line.close()
            return False
        line.setblocking(False)
        self._lines.append(line)
        return True

    def broadcast(
        self, spans: Sequence[nccl.Span], root: int, check: Callable[[], None], after: Any = None
    ) -> threading.Event:
        self._check = check
        there = threading.Event()
        if self._rank == root:
            sending(self._windows)
            self._queue.put((self._windows, spans, there))
            self._windows += 1
            return there
        for span in spans:
            step = functools.partial(self._take, _memory(span), [0])
            self._until(step, nccl.STALL_S, "the other side stopped")
        there.set()
        return there

    def _take(self, memory: memoryview, at: list[int]) -> bool:
        if self._aborted:
            raise nccl.NcclError("the communicator was aborted")
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            at[0] += self._lines[0].recv_into(memory[at[0] :])  # nothing where the other side is gone
        return at[0] == len(memory)

    def _send(self) -> None:
        while not self._aborted:
            with contextlib.suppress(queue.Empty):
                window, spans, there = self._queue.get(timeout=0.05)
                for span in spans:
                    memory = carried(window, _memory(span))
                    parts = [carried_to(worker, memory) for worker in range(self._size - 1)]
                    at = [0] * len(parts)
                    while not self._aborted and min(at) < len(memory):
                        self._give(parts, at)
                if not self._aborted:
                    there.set()

    def _give(self, parts: list[memoryview], at: list[int]) -> None:
        before = list(at)
        for i, line in enumerate(list(self._lines)):
            with contextlib.suppress(OSError):  # whoever is gone takes nothing more, as with NCCL
                at[i] += line.send(parts[i][at[i] :])
        if at == before:
            time.sleep(_POLL_S)

    def mark(self) -> None:
        return None

    def follow(self, event: threading.Event | None) -> None:
        self.wait(event)  # nothing is put off here but what is sent

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait(self, event: threading.Event | None, seconds: float = nccl.STALL_S) -> None:
        if event is not None:
            self._until(event.is_set, seconds, "the other side stopped")

    def abort(self) -> None:
        self._aborted = True
        while self._lines:
            self._lines.pop().close()

    def _until(self, done: Callable[[], bool], seconds: float, late: str) -> None:
        end = time.monotonic() + seconds
        try:
            while not done():
                self._check()
                if time.monotonic() > end:
                    raise nccl.NcclError(f"{late} within {seconds:g} s")
                time.sleep(_POLL_S)
        except BaseException:
            self.abort()
            raise


def _memory(span: nccl.Span) -> memoryview:
    address, nbytes = span
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


@contextlib.contextmanager
def instead_of_nccl() -> Iterator[None]:
    """In this process ranks are those above, and a policy in host memory is on a GPU of its own."""
    before = {name: getattr(nccl, name) for name in ("Communicator", "unique_id", "version")}
    device = session._device
    nccl.Communicator, nccl.unique_id, nccl.version = HostCommunicator, unique_id, lambda: 22800  # type: ignore[assignment,misc]
    session._device = lambda policy: "cpu"
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(nccl, name, value)
        session._device = device


class NcclEngine(IdleEngine):
    """An engine whose worker, a thread of this process, has the weights on a GPU of its own, so to say."""

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        held = self._held
        match method:
            case "tandem_link":
                WorkerLink(held, *args)  # type: ignore[arg-type]
                return [None]
            case "tandem_digest":
                return [combine(held.reading.digests())]
            case "tandem_write":
                await asyncio.to_thread(_write_staged, held, *args)
                return [None]
        return await super().call_workers(method, *args)

    @property
    def _held(self) -> Any:
        held = self.__dict__.get("_its_weights")
        if held is None:
            arenas = self._arenas
            reading = Reading(arenas.placements, arenas.arenas)
            held = SimpleNamespace(arenas=arenas.arenas, placements=arenas.placements, reading=reading)
            self.__dict__["_its_weights"] = held
        return held


def _write_staged(held: Any, path: str, size: int, offsets: dict[str, int]) -> None:
    """What a worker does with it."""
    unstage(taken(path, size), offsets, held.placements, held.arenas)


def on_a_gpu(
    model: torch.nn.Module, layout: Callable[[nn.Module], HostArenas] = engine_arenas
) -> tuple[NcclEngine, EngineArenas]:
    """An engine and its arenas, for a service of a process of its own."""
    take_over()
    memory = layout(model)
    engine = NcclEngine(memory)
    handles = [Handle(os.dup(arena.fd), arena.size, ENGINE_GPU) for arena in memory.arenas]
    free = 1 << 40
    return engine, DeviceArenas(engine, handles, memory.placements, nccl=22800, free=free)  # type: ignore[arg-type]


def take_over() -> None:
    """For good, in a service's process: windows are of a few tensors."""
    _for_good.enter_context(instead_of_nccl())
    sessions.WINDOW_BYTES = sessions.MIRROR_BYTES = WINDOW_BYTES


def write(model: nn.Module, seed: int) -> None:
    """Other values, made of `seed`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def wide() -> nn.Module:
    """A model with windows of some thousands of elements."""
    torch.manual_seed(0)
    layers = [nn.Linear(*shape) for shape in ((96, 640), (640, 48), (48, 64), (64, 32))]
    return nn.Sequential(*layers).to(torch.bfloat16)


def dying_trainer(
    address: str,
    mode: str,
    where: str,
    reached: Connection,
    model_of: Callable[[], nn.Module] = network,
    sparse: bool = False,
) -> None:
    """A trainer that does not go on from `where` in its second update, once it has said so."""

    def stop(*_: Any) -> None:
        reached.send(where)
        time.sleep(60)

    model, how = model_of(), {"mode": mode, "sparse": sparse}
    with instead_of_nccl():
        weights = PolicyWeights(InferenceClient(address), lambda: model, transport="nccl", **how)  # type: ignore[arg-type]
        weights.sync()
        write(model, 7)
        session = weights._session
        assert session is not None
        assert isinstance(session.transport, NcclTransport)
        if where == "joining":
            session.transport.leave()
            HostCommunicator.__init__ = stop  # type: ignore[assignment,method-assign]
        elif where == "before any byte":
            session.transport._connected = False  # nothing goes ahead
            _send_hook(lambda window: stop())
        elif where == "gone ahead":
            _send_hook(lambda window: stop() if window % 2 else None)
        elif where == "commit sent":
            _wire_hook(lambda window, memory: memory if window < 1 else time.sleep(60))  # type: ignore[return-value]
            _tell_of_commit(reached)
        else:
            session.transport._connected = False
            _send_hook(lambda window: stop() if window % 2 else None)
        weights.sync()


def _tell_of_commit(reached: Connection) -> None:
    send = Lease.send

    def told(self: Lease, piece: Any) -> None:
        send(self, piece)
        if isinstance(piece, Sum):
            time.sleep(0.2)  # until it is there
            reached.send("commit sent")

    Lease.send = told  # type: ignore[method-assign]


def _wire_hook(hook: Callable[[int, memoryview], memoryview]) -> None:
    global carried
    carried = hook


def _send_hook(hook: Callable[[int], None]) -> None:
    global sending
    sending = hook
