"""A trainer in a process of its own, which stops at a step that the test names, to be killed there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from tandem import rpc
from tandem.errors import TandemError
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from tests.faults import raw
from tests.forks import processes

#: What a trainer does, in order. A streaming one has no memory to fetch; one is prepared that shall stop there.
STEPS = ("opened", "attached", "begun", "half written", "written", "asked to commit", "committed")
PREPARED = "prepared"


def tensors_for(manifest: Any, seed: int) -> dict[str, torch.Tensor]:
    """Weights of no model, float32, the same wherever they are made."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in manifest}


def _train(address: str, transport: int, mode: int, seed: int, stop_at: str, pipe: Connection) -> None:
    torch.set_num_threads(1)

    def step(name: str) -> None:
        pipe.send(name)
        if name == stop_at:
            pipe.recv()

    with rpc.connect(address) as channel:
        stub = WeightServiceStub(channel)
        try:
            tensors = tensors_for(raw.manifest(stub), seed)
            session = raw.Session(stub, tensors, transport, mode)
            step("opened")
            if session.shared:
                session.attach()
                step("attached")
            update = session.begin()
            step("begun")
            _move(session, update, tensors, step)
            step("written")
            if stop_at == PREPARED:
                update.prepare(session.digest(tensors))
                step(PREPARED)
            update.send(commit=pb.CommitUpdate(digest=session.digest(tensors)))
            step("asked to commit")
            update.expect("committed")
            step("committed")
        except TandemError as error:
            pipe.send(f"error {error.reason}")
    pipe.send("over")


def _move(session: raw.Session, update: raw.Update, tensors: raw.Tensors, step: Any) -> None:
    names = list(tensors)
    chunks = list(session.chunks(tensors)) if not session.shared else []
    for half in range(2):
        if session.shared:
            part = names[half::2]
            session.write({name: tensors[name] for name in part})
        else:
            for chunk in chunks[: len(chunks) // 2] if half == 0 else chunks[len(chunks) // 2 :]:
                update.send(chunk=chunk)
        if half == 0:
            step("half written")


class TrainerProcess:
    """It runs until `stop_at`, and tells of each step."""

    def __init__(
        self, address: str, transport: int, *, mode: int = 0, seed: int = 1, stop_at: str = ""
    ) -> None:
        self._pipe, theirs = processes.Pipe()
        arguments = (address, transport, mode, seed, stop_at, theirs)
        self._process = processes.Process(target=_train, args=arguments)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def wait_for(self, step: str, seconds: float = 60) -> str:
        """Wait until it says something that starts with `step`."""
        while self._pipe.poll(seconds):
            said = str(self._pipe.recv())
            if said.startswith(step):
                return said
        raise AssertionError(f"the trainer never came to {step!r}")

    def go_on(self) -> None:
        """From the step where it stopped."""
        self._pipe.send(None)

    def kill(self) -> None:
        """As the kernel does it: at once, without a word."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join(10)
        assert not self._process.is_alive()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self._process.close()
        self._pipe.close()


@contextmanager
def trainer(
    address: str, transport: int, *, mode: int = 0, seed: int = 1, stop_at: str = ""
) -> Iterator[TrainerProcess]:
    process = TrainerProcess(address, transport, mode=mode, seed=seed, stop_at=stop_at)
    try:
        yield process
    finally:
        process.close()
