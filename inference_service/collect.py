"""Learning from the workers where the engine's weights lie."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from inference_service import passing
from inference_service.arenas import EngineArenas, Handle, HostArenas
from inference_service.device_arenas import DeviceArenas
from inference_service.engine import Engine
from weight_transfer.arena import Arena
from weight_transfer.manifest import TensorSpec
from weight_transfer.parts import why_not_summed
from weight_transfer.placement import Block, Placement, check


async def collect(engine: Engine) -> EngineArenas:
    """Have each worker send the descriptors of its arenas, and say what lies where."""
    async with passing.collected() as (path, received):
        answers = await engine.call_workers("tandem_export", path)
    handles, placements = _merge(answers, received)
    try:
        if reason := next((answer["reason"] for answer in answers if answer["reason"]), ""):
            return HostArenas(reason=reason)
        try:
            check(placements, [handle.size for handle in handles])
        except ValueError as error:  # it serves, and cannot be updated
            return HostArenas(reason=f"the ranks don't hold the whole model: {error}")
        reloads = any(answer["reloads"] for answer in answers)
        if any(handle.gpu for handle in handles):
            if reason := _why_not_digested(handles, placements):
                return HostArenas(reason=reason)
            nccl, free = (min(answer[what] for answer in answers) for what in ("nccl", "free"))
            arenas, handles = DeviceArenas(engine, handles, placements, reloads, nccl=nccl, free=free), []
            return arenas
        mapped = [Arena.open(handle.fd, handle.size) for handle in handles]
        return HostArenas(mapped, placements, reloads, ranks=[handle.rank for handle in handles])
    finally:
        for handle in handles:
            os.close(handle.fd)


def _merge(
    answers: list[dict[str, Any]], received: dict[int, list[int]]
) -> tuple[list[Handle], list[Placement]]:
    handles: list[Handle] = []
    blocks: dict[str, Placement] = {}
    for answer in sorted(answers, key=lambda a: a["rank"]):
        first = len(handles)
        arenas = zip(received[answer["rank"]], answer["arenas"], strict=True)
        handles += [Handle(fd, size, answer["gpu"], answer["rank"]) for fd, size in arenas]
        for name, dtype, shape, raw in answer["placements"]:
            spec = TensorSpec(name, dtype, tuple(shape))
            found = tuple(Block(first + b[0], b[1], tuple(b[2]), b[3], tuple(b[4]), tuple(b[5])) for b in raw)
            before = blocks.setdefault(name, Placement(spec, ()))
            blocks[name] = replace(before, blocks=before.blocks + found)
    return handles, [blocks[name] for name in sorted(blocks)]


def _why_not_digested(handles: list[Handle], placements: list[Placement]) -> str:
    """Why the digest of weights that several workers hold could not be told; "" if it can."""
    if len({handle.rank for handle in handles}) > 1:
        for placement in placements:
            if why := why_not_summed(placement):
                return f"the engine is on several GPUs, over which {placement.spec.name} has no digest: {why}"
    return ""
