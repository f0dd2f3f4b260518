"""Real services as real processes, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.engine.v1.engine_pb2_grpc import EngineServiceStub
from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tandem.rpc import connect
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from trainer_service.jobs import gpus

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # spares the seconds that compiling small kernels takes
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
#: A small engine that starts in seconds.
ENGINE = {
    "enforce_eager": "true",
    "max_model_len": "256",
    "max_num_seqs": "8",
    "max_num_batched_tokens": "512",
    "kv_cache_memory_bytes": str(16 << 20),
    "seed": "0",
}


@dataclass
class Service:
    """A running inference service."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    channel: grpc.Channel

    @property
    def inference(self) -> InferenceServiceStub:
        return InferenceServiceStub(self.channel)

    @property
    def engine(self) -> EngineServiceStub:
        return EngineServiceStub(self.channel)

    @property
    def weights(self) -> WeightServiceStub:
        return WeightServiceStub(self.channel)

    def health(self, service: str = "tandem.inference.v1.InferenceService") -> str:
        """SERVING, NOT_SERVING, or the code of the error that the health check met."""
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=5)
        except grpc.RpcError as error:
            return str(error.code().name)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    def wait_until(self, status: str, seconds: float = 240) -> None:
        """Wait until health says `status`."""
        end = time.monotonic() + seconds
        while (now := self.health()) != status:
            code = self.process.poll()
            assert code is None, f"the service ended with {code}:\n{self.tail()}"
            assert time.monotonic() < end, f"health is {now}, not {status}:\n{self.tail()}"
            time.sleep(0.05)

    def tail(self) -> str:
        """The end of its log. What a worker of an engine says is far above how engine, and then service, end."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-160:])

    def children(self) -> list[int]:
        """Process ids of what it started, at any depth."""
        import psutil

        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def stop(self) -> int:
        """End it in order. Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def _until_gone(group: int, seconds: float = 20) -> None:
    """Wait until no process of the group is left. What it had of a device is free only then."""
    import psutil

    def alive() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    end = time.monotonic() + seconds
    while left := alive():
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def on_devices(*numbers: int) -> dict[str, str]:
    """Environment of a process that is to have these of the devices that this one has."""
    there = gpus.found()
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[number] for number in numbers)}


@contextlib.contextmanager
def inference_service(
    model: Path,
    folder: Path,
    *flags: str,
    wait: bool = True,
    environment: dict[str, str] | None = None,
    **engine: object,
) -> Iterator[Service]:
    """A service for `model` on a Unix socket in `folder`. Whatever happens, no process of it is left."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"unix://{folder}/inference.sock"
    log = folder / "inference.log"
    arguments = [f"--engine={name}={value}" for name, value in (ENGINE | engine).items()]
    command = [sys.executable, "-m", "inference_service", f"--model={model}", f"--addresses={address}"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*command, *arguments, *flags],
            stdout=out,
            stderr=out,
            env=os.environ | ENVIRONMENT | (environment or {}),
            start_new_session=True,
        )
    with connect(address) as channel:
        service = Service(process, address, log, channel)
        try:
            if wait:
                service.wait_until("SERVING")
            yield service
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            _until_gone(process.pid)
