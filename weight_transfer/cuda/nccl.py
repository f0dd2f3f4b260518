"""NCCL between a trainer and an engine's worker. Nothing here waits without a deadline, and either side may give up."""

from __future__ import annotations

import functools
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from weight_transfer import _core

ID_BYTES = 128
JOIN_S = 30.0
"""Seconds until the other side must have joined."""
STALL_S = 10.0
"""Seconds after which a window that does not arrive is given up. The slowest link that NCCL is for needs less."""

# NCCL does in a thread of its own what it is asked for, most often in less time than any sleep takes.
_SPIN_S, _POLL_S = 2e-4, 5e-5
_ABORT_S = 5.0

Span = tuple[int, int]


class NcclError(RuntimeError):
    """The communicator failed, in NCCL's words, or the other side did not come in time."""


@functools.cache
def version() -> int:
    """NCCL's version here, as ncclGetVersion tells it (22809 is 2.28.9); 0 where there is none, or no GPU."""
    if not torch.cuda.is_available():
        return 0
    for path in _paths():
        try:
            return _core.load_nccl(path)
        except RuntimeError:
            continue
    return 0


def _paths() -> list[str]:
    # Torch's own first: two libraries in one process do not know of each other.
    paths = ["libnccl.so.2"]
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        package = None
    if package is not None:
        paths += [
            str(Path(place, "lib", "libnccl.so.2")) for place in package.submodule_search_locations or ()
        ]
    return paths


def unique_id() -> bytes:
    """What both sides need to join one communicator. Whoever makes it listens until they have. Raises NcclError."""
    if not version():
        raise NcclError("there is no NCCL here")
    with _told():
        return _core.nccl_unique_id()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise NcclError(str(error)) from error


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A device, and a stream that waits for no other of it, are the current ones; nothing happens in host memory."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        yield


def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]


class Communicator:
    """One rank's end. Whatever is raised while something is waited for ends it."""

    def __init__(
        self,
        id: bytes,
        rank: int,
        size: int,
        device: torch.device,
        check: Callable[[], None],
        *,
        join_s: float = JOIN_S,
    ) -> None:
        """Join. `check` is called meanwhile, and may raise.

        Raises:
            NcclError: among others, the others did not join within `join_s` seconds.
        """
        if not version():
            raise NcclError("there is no NCCL here")
        self.device = device
        # Ahead of kernels that are ready when a window ends: those digest what is there, and have time.
        self.stream = _stream(device, priority=-1)
        self._side: torch.cuda.Stream | None = None
        self._check = check
        with torch.cuda.device(device):
            with _told():
                self._core = _core.Communicator(id, rank, size)
        self._until(self._core.ready, join_s, "the other side did not join")

    def broadcast(
        self,
        spans: Sequence[Span],
        root: int,
        check: Callable[[], None],
        after: torch.cuda.Event | None = None,
    ) -> torch.cuda.Event:
        """Bring (address, bytes) of `root` to all, after an event, and behind what was to be brought before.

        Returns:
            An event that is reached when they are there; wait for it with `wait`.

        Raises:
            NcclError. What `check` raises, which is called while anything is waited for, here and in `wait`.
        """
        self._check = check
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.device(self.device):
            with _told():
                self._core.broadcast(spans, root, self.stream.cuda_stream)
        # Connections are made at the first call, in a thread of NCCL's, for which the other side is needed.
        self._until(self._core.ready, JOIN_S, "the other side did not connect")
        reached: torch.cuda.Event = self.stream.record_event()
        return reached

    def mark(self) -> torch.cuda.Event:
        """An event that is reached when the current stream has done what it has to do so far."""
        marked: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return marked

    def follow(self, event: torch.cuda.Event) -> None:
        """Have the current stream do what comes after the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Have a stream of this rank's be the current one, for what is to be done while bytes travel: always the same,
        since torch has few, and the next new one may be that on which they do."""
        # Only when wanted: torch has few, and a worker's may be vLLM's.
        side = self._side = self._side or _stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(side):
            yield

    def wait(self, event: torch.cuda.Event, seconds: float = STALL_S) -> None:
        """Wait until an event of `broadcast`, or one behind it, is reached.

        Raises:
            NcclError: among others, it is not within `seconds`. What `check` raises.
        """

        def done() -> bool:
            self._core.ready()
            return bool(event.query())  # type: ignore[no-untyped-call]

        self._until(done, seconds, "the other side stopped")

    def abort(self) -> None:
        """End it, whatever the other side does."""
        # A library that hangs in this may keep a thread, and nobody else.
        ending = threading.Thread(target=self._core.abort, name="nccl-abort", daemon=True)
        ending.start()
        ending.join(_ABORT_S)

    def _until(self, done: Callable[[], bool], seconds: float, late: str) -> None:
        began = time.monotonic()
        try:
            while True:
                with _told():
                    if done():
                        return
                self._check()
                waited = time.monotonic() - began
                if waited > seconds:
                    raise NcclError(f"{late} within {seconds:g} s")
                time.sleep(0 if waited < _SPIN_S else _POLL_S)
        except BaseException:
            self.abort()
            raise
