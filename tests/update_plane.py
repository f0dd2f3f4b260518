"""A policy of real memory that is updated in each of the ways, with an engine that fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inference_service.arenas import HostArenas
from inference_service.policy import Policy, WeightState
from inference_service.staging import MappedStaging
from inference_service.transports import STREAM, Way
from inference_service.update import Update
from tandem.errors import TandemError
from tests.policy_machine import Engine
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides
from weight_transfer.sparse import Changes, Packed, bits, changed, pack

SPECS = (
    TensorSpec("a", "float32", (3, 4)),
    TensorSpec("b", "bfloat16", (4, 6)),  # in two pieces, the second half first
    TensorSpec("c", "float16", (1000,)),
    TensorSpec("empty", "float32", (0, 4)),
    TensorSpec("scalar", "bfloat16", ()),
)
LIMIT = 64  # bytes of a chunk
C, S, W, T = WeightState


def random_bits(seed: int) -> list[torch.Tensor]:
    """Tensors of any bits: infinities, and NaNs with payloads."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in SPECS:
        raw = torch.randint(0, 256, (spec.nbytes,), generator=generator, dtype=torch.uint8)
        made.append(raw.view(getattr(torch, spec.dtype)).reshape(spec.shape))
    return made


def digest_of(tensors: list[torch.Tensor]) -> int:
    return combine(digest_tensors(tensors))


class Plane:
    """A policy, of which the engine and the trainer hold version 1 alike."""

    def __init__(self, reloads: bool = False) -> None:
        placements, offset = [], 0
        for spec in SPECS:
            strides = contiguous_strides(spec.shape)
            blocks: tuple[Block, ...] = (Block(0, offset, strides, 0, strides, spec.shape),)
            if spec.name == "b":
                half = (2, 6)
                blocks = (
                    Block(0, offset + 24, strides, 0, strides, half),
                    Block(0, offset, strides, 12, strides, half),
                )
            placements.append(Placement(spec, blocks))
            offset += 4096
        self.arenas = HostArenas([Arena.create("test", offset)], placements, reloads)
        self.engine = Engine()
        self.policy = Policy(self.engine, self.arenas)  # type: ignore[arg-type]
        self.values = random_bits(1)
        self.arenas.write(self.values)
        self.stage = MappedStaging(self.arenas.manifest)

    def way(self, name: str) -> Way:
        transport, _, how = name.partition(" ")
        return Way(
            STREAM if transport == "sparse" else transport,
            in_place=how == "in place",
            partial=transport == "sparse",
            stage=self.stage if name == "shared staged" else None,
        )

    async def begin(self, name: str) -> Update:
        return await self.policy.begin(self.policy.version, self.way(name))

    def bring(self, update: Update, name: str, new: list[torch.Tensor]) -> None:
        """Have the bytes of `new` reach the update, as its trainer would."""
        if name == "shared in place":
            self.arenas.write(new)
        elif name == "shared staged":
            for value, place in zip(new, self.stage.complete(), strict=True):
                place.copy_(value)
        elif name.startswith("sparse"):
            for packed in self.packed(new):
                update.changes(packed)
        else:
            for i, value in enumerate(new):
                raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
                for start in range(0, len(raw), LIMIT):
                    update.chunk(i, start, raw[start : start + LIMIT])

    def packed(self, new: list[torch.Tensor]) -> Iterator[Packed]:
        for i, (now, before) in enumerate(zip(new, self.values, strict=True)):
            where = changed(bits(now), bits(before))
            yield from pack(Changes(i, where, bits(now)[where]), LIMIT)

    @property
    def digest(self) -> int:
        """Of what the engine computes with."""
        return self.arenas.digest()

    def check(self, state: WeightState, version: int, values: list[torch.Tensor]) -> None:
        assert (self.policy.state, self.policy.version) == (state, version)
        assert self.policy._update is None
        assert self.engine.generating == (state is C)
        if state is C:
            assert self.digest == digest_of(values)


WAYS = [
    "stream staged",
    "stream in place",
    "shared staged",
    "shared in place",
    "sparse staged",
    "sparse in place",
]
STAGED = [name for name in WAYS if name.endswith("staged")]
ways = pytest.mark.parametrize("name", WAYS)


async def reason(move: Any) -> str:
    """ "" or the reason of the error."""
    try:
        async with asyncio.timeout(30):
            await move
    except TandemError as error:
        return str(error.reason)
    return ""
