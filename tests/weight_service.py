"""The inference service's real weight plane in a process of its own, around an engine that computes nothing.

For what trainers do when services vanish and come back: a real engine takes many seconds to start again. A
fork server that has everything imported makes that a tenth of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from inference_service.arenas import EngineArenas, HostArenas
from inference_service.host import Host
from inference_service.launch import ModelInfo
from inference_service.policy import Policy
from inference_service.servicers.engine import EngineServicer
from inference_service.servicers.inference import InferenceServicer
from inference_service.servicers.weights import WeightServicer
from inference_service.sessions import Sessions
from tandem.engine.v1 import engine_pb2_grpc
from tandem.inference.v1 import inference_pb2_grpc
from tandem.rpc import Serving, ServingConfig
from tandem.weights.v1 import weights_pb2_grpc
from tests.forks import processes
from weight_transfer.arena import Arena, align
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides

EngineOf = Callable[[nn.Module], tuple[Any, EngineArenas]]


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model that the engine is of. Always with the same values."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, bias=False)).to(dtype)


def of_checkpoint(path: Path) -> nn.Module:
    """A model that computes nothing, whose parameters are the tensors of a checkpoint, by its names."""
    model = nn.Module()
    for name, tensor in load_file(path / "model.safetensors").items():
        *folders, last = name.split(".")
        module = model
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module.get_submodule(folder)
        module.register_parameter(last, nn.Parameter(tensor))
    return model


class IdleEngine:
    """An engine that has weights, can be stopped, and generates nothing."""

    def __init__(self, arenas: HostArenas) -> None:
        self._arenas = arenas
        self.info = ModelInfo("idle", uuid.uuid4().hex, 64, 64, "bfloat16", "processed_logprobs", 20, "none")
        self.dead = self.asleep = False
        self.holders: set[str] = set()
        self.llm = SimpleNamespace(abort=self._nothing)

    @property
    def paused(self) -> bool:
        return bool(self.holders)

    async def halt(
        self, who: str, mode: str = "keep", *, settle: bool = False, keep_cache: Any = None
    ) -> asyncio.Future[None]:
        self.holders.add(who)
        return await self.forget()

    async def forget(self) -> asyncio.Future[None]:
        forgotten: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        forgotten.set_result(None)
        return forgotten

    async def release(self, who: str) -> None:
        self.holders.discard(who)

    async def sleep(self, told: Callable[[], None]) -> int:
        self.asleep = True
        self.holders.add("sleep")
        told()
        return 1

    async def wake_up(self, told: Callable[[], None]) -> None:
        self.asleep = False
        self.holders.discard("sleep")
        told()

    def held_by(self, who: str) -> bool:
        return who in self.holders

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        if method == "tandem_restore":  # its checkpoint is all zeros
            for arena in self._arenas.arenas:
                arena.tensor(0, (arena.size,), torch.uint8).zero_()
        return []

    async def _nothing(self, *args: Any) -> None:
        pass


def engine_arenas(model: nn.Module) -> HostArenas:
    """Zeroed memory for `model` in bfloat16, each tensor in one block."""
    placements, offset = [], 0
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        spec, strides = TensorSpec(name, "bfloat16", shape), contiguous_strides(shape)
        placements.append(Placement(spec, (Block(0, offset, strides, 0, strides, shape),)))
        offset = align(offset + spec.nbytes)
    return HostArenas([Arena.create("engine", offset)], placements)


def idle(model: nn.Module) -> tuple[IdleEngine, EngineArenas]:
    """An engine for `model`, and its arenas."""
    arenas = engine_arenas(model)
    return IdleEngine(arenas), arenas


def stopping_late(model: nn.Module, time: int, seconds: float) -> tuple[IdleEngine, EngineArenas]:
    """The engine of `idle`, which stands before a long step the `time` that it shall stop."""
    engine, arenas = idle(model)
    halt, halts = engine.halt, []

    async def stops(who: str, *args: Any, **named: Any) -> Any:
        halts.append(who)
        if len(halts) == time:
            engine.holders.add(who)
            await asyncio.sleep(seconds)
        return await halt(who, *args, **named)

    engine.halt = stops  # type: ignore[method-assign]
    return engine, arenas


async def serve(
    address: str,
    lease_timeout_s: float,
    model: Callable[[], nn.Module] = network,
    max_chunk_bytes: int = 1 << 12,
    engine_of: EngineOf = idle,
) -> None:
    engine, arenas = engine_of(model())
    policy = Policy(engine, arenas)  # type: ignore[arg-type]
    sessions = Sessions(arenas)
    await sessions.start()
    host = Host()
    host.load(policy, sessions)
    serving = Serving(ServingConfig(addresses=(address,), handle_signals=False, grace_s=0))
    serving.add(
        weights_pb2_grpc.add_WeightServiceServicer_to_server,
        WeightServicer(host, lease_timeout_s, max_chunk_bytes, serving.ending),
        "tandem.weights.v1.WeightService",
        long_lived=["WatchWeightVersion"],
    )
    serving.add(
        engine_pb2_grpc.add_EngineServiceServicer_to_server,
        EngineServicer(host, lambda: serving.max_lag_s),
        "tandem.engine.v1.EngineService",
    )
    serving.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceServicer(host, 1 << 20),
        "tandem.inference.v1.InferenceService",
    )
    await serving.start()
    await serving.wait()


def _main(address: str, lease_timeout_s: float, model: Callable[[], nn.Module], engine_of: EngineOf) -> None:
    asyncio.run(serve(address, lease_timeout_s, model, engine_of=engine_of))


class WeightService:
    """Start it, kill it, start it again at the same address: each life has an engine and memory of its
    own."""

    def __init__(
        self,
        address: str,
        lease_timeout_s: float,
        model: Callable[[], nn.Module] = network,
        engine_of: EngineOf = idle,
    ) -> None:
        self.address = address
        self._of = (address, lease_timeout_s, model, engine_of)
        self._process: Any = None

    def start(self) -> None:
        self._process = processes.Process(target=_main, args=self._of)
        self._process.start()

    def freeze(self) -> None:
        """Have it do nothing more, and its sockets stay open."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(10)
