"""Parameters that are spread over the ranks of a run, FSDP2's and DeepSpeed ZeRO-3's, and how they are read whole.

Only the main process talks to the engine, and only it knows which tensor it needs next. It tells the others, who then
take part in gathering that tensor. No rank ever holds more than one whole tensor beside its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import nn

from weight_transfer.transports import SourceTensor

_END = -1


def is_sharded(tensor: Any) -> bool:
    """Whether this rank holds a part of it only."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape that it has when it is whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole(tensor: Any) -> torch.Tensor:
    """Its value, gathered. Every rank must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


@contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """ZeRO-3's parameters are whole while this lasts, for reading. Every rank must enter; nothing happens to others."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    gathering: Any = nullcontext()
    if partitioned:
        import deepspeed  # type: ignore[import-not-found]

        gathering = deepspeed.zero.GatheredParameters(partitioned)
    with gathering:
        yield


class Gathering:
    """How the ranks of one run read the policy together."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: Callable[[], nn.Module],
        policy: Callable[[], list[SourceTensor]],
    ) -> None:
        """Prepare.

        Args:
            accelerator: of the run.
            model: gives the policy as it is now.
            policy: lists all its tensors, in the same order on every rank.
        """
        self._accelerator = accelerator
        self._model = model
        self._policy = policy
        self._places: dict[str, int] = {}

    def needed(self) -> bool:
        """Whether the model is spread over ranks. The same on each."""
        return self._accelerator.num_processes > 1 and any(map(is_sharded, self._model().parameters()))

    @contextmanager
    def leading(self) -> Iterator[None]:
        """While this lasts in the main process, what `led` lists can be read. The others must `follow`."""
        self._places = {source.name: place for place, source in enumerate(self._policy())}
        try:
            yield
        finally:
            self._places = {}
            self._tell(_END)

    def led(self, policy: list[SourceTensor]) -> list[SourceTensor]:
        """`policy`, of which each read is told to the other ranks, while the main process leads."""
        if not self._places:
            return policy

        def read(source: SourceTensor) -> torch.Tensor:
            self._tell(self._places[source.name])
            return source.read()

        return [
            replace(source, read=lambda source=source: read(source), parameter=None)  # type: ignore[misc]
            for source in policy
        ]

    def follow(self) -> None:
        """Take part in what the main process reads, until it leads no more."""
        policy = self._policy()
        while (place := self._tell(_END)) != _END:
            policy[place].read()

    def _tell(self, place: int) -> int:
        """What the main process says."""
        told = torch.tensor(place, dtype=torch.int64, device=self._accelerator.device)
        return int(broadcast(told, from_process=0).item())
