"""Parameters that are spread over the ranks of a run, FSDP2's and DeepSpeed ZeRO-3's, and how they are read whole.

Only the main process talks to the engine, and only it knows which tensor it needs next. It tells the others, who then
take part in gathering that tensor. No rank ever holds more than one whole tensor beside its shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.tensor import Shard

from trainer_service.cuts import Reader
from trainer_service.ranks import OutOfStepError, Ranks
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


def elements_by_rank(tensor: Any) -> list[tuple[int, int]] | None:
    """Which elements of it, in row-major order, each rank of the run has: first, and one past the last.

    The same on each rank. None where it is spread in another way than FSDP2's, by its rows over all ranks.
    """
    mesh: Any = getattr(tensor, "device_mesh", None)
    placements: Any = getattr(tensor, "placements", ())
    if (
        mesh is None
        or mesh.ndim != 1
        or mesh.mesh.tolist() != list(range(torch.distributed.get_world_size()))
    ):
        return None
    if [type(placement) for placement in placements] != [Shard] or placements[0].dim != 0:
        return None
    rows, *columns = tensor.shape
    row = math.prod(columns)
    share = -(-rows // mesh.size())
    return [(min(i * share, rows) * row, min((i + 1) * share, rows) * row) for i in range(mesh.size())]


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
    """How the ranks of one run read the policy together, and what else the others do as the main process says."""

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
        self._reader = Reader(self._announce)
        self._orders: Mapping[int, Callable[[], object]] = {}
        self._ranks: Ranks | None = None
        self.leads = False  # this is the main process, and the others follow

    def obey(self, orders: Mapping[int, Callable[[], object]], ranks: Ranks) -> None:
        """From now on `follow` carries out these, by number below -1. What is said goes by `ranks`."""
        self._orders, self._ranks = orders, ranks

    def needed(self) -> bool:
        """Whether the main process needs the others for the policy. The same on each."""
        return self._accelerator.num_processes > 1 and (bool(self._orders) or self.spread())

    def spread(self) -> bool:
        """Whether the model is spread over ranks. The same on each."""
        return any(map(is_sharded, self._model().parameters()))

    @contextmanager
    def leading(self) -> Iterator[None]:
        """While this lasts in the main process, what `led` lists can be read. The others must `follow`.

        Begins once all are there, so that the engine does not stand still for one that comes late.
        """
        self._meet()
        if self.spread():
            self._places = {source.name: place for place, source in enumerate(self._policy())}
        self.leads, in_step = True, True
        try:
            yield
        except OutOfStepError:
            in_step = False
            raise
        finally:
            self._reader.forget()
            self._places, self.leads = {}, False
            if in_step:
                self._tell(_END)

    def order(self, number: int) -> None:
        """In the main process, while it leads: have the others do what they obey by that number."""
        self._tell(number)

    def led(self, policy: list[SourceTensor]) -> list[SourceTensor]:
        """`policy`, of which what must be gathered is told to the other ranks, while the main process leads.

        Pieces of one parameter that are read one after the other are of one gathering, which is held until then. A
        read raises OutOfStepError where it fails: others may be waiting in it.
        """
        if not self._places:
            return policy
        return [replace(source, read=partial(self._read, source), parameter=None) for source in policy]

    def follow(self) -> Exception | None:
        """Take part in what the main process reads and orders, until it leads no more.

        Returns:
            What went wrong here in the last thing that it ordered, of which it was told.

        Raises:
            OutOfStepError: this rank cannot follow any more.
        """
        self._meet()
        policy = self._policy() if self.spread() else []
        failed: Exception | None = None
        while (said := self._tell(_END)) != _END:
            if said >= 0:
                policy[said].read()
                continue
            try:
                failed = None
                self._orders[said]()
            except OutOfStepError:
                raise
            except Exception as error:  # noqa: BLE001  returned
                failed = error
        return failed

    def _meet(self) -> None:
        if self._ranks is None:
            self._accelerator.wait_for_everyone()
        else:
            self._ranks.meet()

    def _read(self, source: SourceTensor) -> torch.Tensor:
        try:
            return self._reader.read(source)
        except Exception as error:
            raise OutOfStepError.at(source.name, error) from error

    def _announce(self, source: SourceTensor) -> None:
        self._tell(self._places[source.name])

    def _tell(self, place: int) -> int:
        """What the main process says."""
        if self._ranks is not None:
            said = self._ranks.tell(place.to_bytes(8, "little", signed=True))
            return int.from_bytes(said, "little", signed=True)
        number = torch.tensor(place, dtype=torch.int64, device=self._accelerator.device)
        return int(broadcast(number, from_process=0).item())
