"""Reward functions to serve, the process that serves one, and a service that answers what a test says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tandem.reward.v1 import reward_pb2 as pb
from tandem.reward.v1 import reward_pb2_grpc

ROOT = Path(__file__).parents[1]


def shown(value: Any) -> str:
    """A value as a test's name has it: the same in every process."""
    return re.sub(r" at 0x\w+", "", value if isinstance(value, str) else repr(value))


def length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


async def awaited(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def seen(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    trainer_state: Any,
    times: list[int],
    **_: Any,
) -> list[float | None]:
    """Depends on everything that a function gets. None where the completion is empty."""
    return [
        None
        if not completion
        else times[i] * (len(prompts[i]) + sum(completion_ids[i])) + trainer_state.global_step
        for i, completion in enumerate(completions)
    ]


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """No two rollouts of a group earn the same for long."""
    return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]


def held(completions: list[str], **_: Any) -> list[float]:
    """Writes that it is called, and returns when the file `go` is there."""
    folder = Path(os.environ["TANDEM_TEST_FOLDER"])
    (folder / "called").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return [float(len(completion)) for completion in completions]


@dataclass
class Served:
    """A reward service in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(10)


@contextlib.contextmanager
def running(
    command: list[str], address: str, folder: Path, environment: dict[str, str] | None = None
) -> Iterator[Served]:
    """A process that serves rewards at `address`, which answers when this enters. It is gone afterwards."""
    log = folder / "reward.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=os.environ | {"TANDEM_TEST_FOLDER": str(folder)} | (environment or {}),
        )
    try:
        with grpc.insecure_channel(address.replace("unix://", "unix:")) as channel:
            ready = channel.unary_unary("/tandem.reward.v1.RewardService/Score")
            end = time.monotonic() + 120
            while True:
                try:
                    ready(b"", timeout=5, wait_for_ready=False)
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:  # a token is wanted
                        break
                    assert process.poll() is None, f"it ended:\n{log.read_text()}"
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.02)
                else:
                    break
        yield Served(process, address, log)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)


@contextlib.contextmanager
def served(function: str, folder: Path, *flags: str) -> Iterator[Served]:
    """`python -m trainer_service.rewards` of a function of this module, at a socket in `folder`."""
    address = f"unix://{folder}/{function}.sock"
    command = [
        sys.executable,
        "-m",
        "trainer_service.rewards",
        f"tests.rewards:{function}",
        "--address",
        address,
    ]
    with running([*command, *flags], address, folder) as service:
        yield service


@dataclass
class Scripted(reward_pb2_grpc.RewardServiceServicer):
    """Answers with `answer`, which may abort."""

    answer: Callable[[pb.ScoreRequest, Any], list[float | None]]
    requests: list[pb.ScoreRequest] = field(default_factory=list)

    def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        self.requests.append(request)
        return pb.ScoreResponse(rewards=[pb.Reward(value=value) for value in self.answer(request, context)])


@contextlib.contextmanager
def scripted(
    folder: Path, answer: Callable[[pb.ScoreRequest, Any], list[float | None]]
) -> Iterator[Scripted]:
    """A plain gRPC server, as users write them, at `folder`/scripted.sock."""
    servicer = Scripted(answer)
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix:{folder}/scripted.sock")
        server.start()
        yield servicer
        server.stop(0).wait()
