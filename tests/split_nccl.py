"""An engine of two workers on GPUs of their own, so to say, over which the weights are split as vLLM splits them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from inference_service.arenas import EngineArenas, Handle, HostArenas
from inference_service.device_arenas import DeviceArenas
from inference_service.receiving import Crew
from inference_service.worker_link import WorkerLink
from tests import host_nccl
from tests.weight_service import IdleEngine
from weight_transfer.arena import Arena, align
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.reading import part_sums

WORKERS = 2


class SplitEngine(IdleEngine):
    """Its workers are threads of this process."""

    def __init__(self, memory: HostArenas, mine: list[list[Placement]]) -> None:
        super().__init__(memory)
        self._held: list[Any] = [
            SimpleNamespace(arenas=[arena], placements=places)
            for arena, places in zip(memory.arenas, mine, strict=True)
        ]
        self._links: list[WorkerLink | None] = [None] * WORKERS

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        match method:
            case "tandem_link":
                path, ranks, specs = args
                manifest = Manifest(tuple(TensorSpec(n, d, tuple(s)) for n, d, s in specs))
                self._links = [
                    WorkerLink(held, path, before, Crew(rank + 1, ranks, manifest))
                    for rank, (held, before) in enumerate(zip(self._held, self._links, strict=True))
                ]
                return [None] * WORKERS
            case "tandem_sums":
                return [
                    {"rank": rank, "sums": part_sums(held.placements, held.arenas).sums()}
                    for rank, held in enumerate(self._held)
                ]
        return await super().call_workers(method, *args)


def split(model: nn.Module) -> tuple[HostArenas, list[list[Placement]]]:
    """Zeroed memory of two workers for `model` in bfloat16, and each worker's own placements, in its arena alone.

    Matrices are split by rows where the rows are many, else by columns; vectors are on both.
    """
    mine: list[list[Placement]] = [[], []]
    offset = 0
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        spec = TensorSpec(name, "bfloat16", shape)
        dim = None if len(shape) == 1 else 0 if shape[0] >= shape[1] else 1
        part = shape if dim is None else tuple(n // 2 if i == dim else n for i, n in enumerate(shape))
        strides, dense = contiguous_strides(shape), contiguous_strides(part)
        for rank, places in enumerate(mine):
            first = 0 if dim is None else rank * part[dim] * strides[dim]
            places.append(Placement(spec, (Block(0, offset, dense, first, strides, part),)))
        offset = align(offset + spec.nbytes)
    merged = [
        Placement(one.spec, (one.blocks[0], Block(1, *_after_arena(other.blocks[0]))))
        for one, other in zip(*mine, strict=True)
    ]
    arenas = [Arena.create("engine", offset) for _ in range(WORKERS)]
    return HostArenas(arenas, merged, ranks=range(WORKERS)), mine


def _after_arena(block: Block) -> tuple[Any, ...]:
    return (
        block.arena_offset,
        block.arena_strides,
        block.tensor_offset,
        block.tensor_strides,
        block.shape,
    )


def on_two_gpus(model: torch.nn.Module) -> tuple[SplitEngine, EngineArenas]:
    """An engine and its arenas, for a service of a process of its own."""
    host_nccl.take_over()
    memory, mine = split(model)
    engine = SplitEngine(memory, mine)
    handles = [
        Handle(os.dup(arena.fd), arena.size, f"{host_nccl.ENGINE_GPU}-{rank}", rank)
        for rank, arena in enumerate(memory.arenas)
    ]
    free = 1 << 40
    return engine, DeviceArenas(engine, handles, memory.placements, nccl=22800, free=free)  # type: ignore[arg-type]
