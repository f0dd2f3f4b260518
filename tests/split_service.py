"""A weight service whose engine has two workers, and ranks of a trainer that write its memory together, for tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from inference_service.arenas import EngineArenas, HostArenas
from tandem.weights.v1 import weights_pb2 as pb
from tests.weight_service import IdleEngine
from trainer_service.client import InferenceClient
from trainer_service.generation import RemoteGeneration
from trainer_service.policy_tensors import EVERYTHING, policy_tensors
from trainer_service.shards import Gathering
from trainer_service.together import Together
from trainer_service.weights import PolicyWeights
from weight_transfer.arena import Arena, align
from weight_transfer.digest import combine, digest_tensor
from weight_transfer.manifest import TensorSpec
from weight_transfer.placement import Block, Placement, contiguous_strides

#: Which dimension of each tensor the workers split; None where each has all of it, as of any other.
SPLIT: dict[str, int | None] = {
    "0.weight": 0,
    "0.bias": 0,
    "1.weight": 1,
    "2.weight": None,
    "2.bias": None,
    "3.weight": 0,
}


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Always with the same values."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 32), nn.Linear(32, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 64, bias=False))
    return nn.Sequential(*layers).to(dtype)


def split_arenas(model: nn.Module) -> HostArenas:
    """Zeroed memory for `model` in bfloat16, a half of each tensor in either arena."""
    placements, offsets = [], [0, 0]
    for name, parameter in sorted(model.named_parameters()):
        spec, axis = TensorSpec(name, "bfloat16", tuple(parameter.shape)), SPLIT.get(name)
        strides, blocks = contiguous_strides(spec.shape), []
        for rank in range(2):
            shape = tuple(n // 2 if dim == axis else n for dim, n in enumerate(spec.shape))
            first = 0 if axis is None else rank * shape[axis] * strides[axis]
            blocks.append(Block(rank, offsets[rank], contiguous_strides(shape), first, strides, shape))
            offsets[rank] = align(offsets[rank] + spec.nbytes)
        placements.append(Placement(spec, tuple(blocks)))
    arenas = [Arena.create(f"worker-{rank}", size) for rank, size in enumerate(offsets)]
    return HostArenas(arenas, placements, ranks=[0, 1])


def split(model: nn.Module) -> tuple[IdleEngine, EngineArenas]:
    """An engine of two workers for `model`, and its arenas."""
    arenas = split_arenas(model)
    return IdleEngine(arenas), arenas


class Rank:
    """One of the run's ranks, as trainers make them: `sync` is TRL's call.

    transport: of the main process. Where it is shared, all ranks are ready to write together.
    """

    def __init__(
        self, address: str, model: nn.Module, *, cpu: bool = True, transport: str = "shared"
    ) -> None:
        self.accelerator = Accelerator(cpu=cpu)
        self.number = self.accelerator.process_index
        assert self.accelerator.num_processes == 2
        self.client, self.model = InferenceClient(address), model
        everything = partial(policy_tensors, model, EVERYTHING)
        self.gathering = Gathering(self.accelerator, lambda: model, everything)
        shared = transport == "shared"
        self.together = Together(self.accelerator, self.gathering, lambda: model) if shared else None
        self.weights = None
        if self.number == 0:
            self.weights = PolicyWeights(
                self.client,
                lambda: model,
                transport=transport,
                timeout_s=30,
                led=self.gathering.led,
                together=self.together,
            )
        self.generation = RemoteGeneration(
            None,
            self.accelerator,
            None,
            client=self.client,
            weights=self.weights,
            gathering=self.gathering,
            server_timeout=30,
        )

    def sync(self) -> None:
        self.generation.sync_weights()

    def digest(self) -> int:
        """The engine's, which reads all of its memory."""
        request = pb.GetWeightVersionRequest(include_digest=True)
        return int(self.client.weights.GetWeightVersion(request, timeout=30).digest)

    def state(self) -> Any:
        return self.client.weights.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=30)

    def policys_digest(self) -> int:
        """The policy's in the engine's dtype, gathered where it is spread: every rank must call this."""
        sources = sorted(policy_tensors(self.model, EVERYTHING), key=lambda source: source.name)
        return combine([digest_tensor(source.read().to(torch.bfloat16)) for source in sources])

    def close(self) -> None:
        if self.weights is not None:
            self.weights.detach()
        if self.together is not None:
            self.together.leave()
        self.client.close()
