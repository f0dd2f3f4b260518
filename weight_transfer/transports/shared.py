"""Shared: the trainer maps the engine's memory. Its parameters become that memory, or are written into it."""

from __future__ import annotations

import operator
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weight_transfer import descriptors, placement
from weight_transfer import digest as digests
from weight_transfer.arena import Arena
from weight_transfer.manifest import Manifest
from weight_transfer.placement import Placement
from weight_transfer.transports.base import Chunk, Handshake, Moved, SourceTensor, WeightTransport
from weight_transfer.transports.watch import Watch
from weight_transfer.write import again, write


class SharedTransport(WeightTransport):
    """Aliases each parameter whose placement is one contiguous block of its own dtype, and scatters the rest.

    The connection to the descriptor socket is the session: the service ends it when the connection closes.
    """

    name = "shared"

    def __init__(
        self,
        manifest: Manifest,
        placements: Sequence[Placement],
        arenas: Sequence[Arena],
        connection: socket.socket | None = None,
    ) -> None:
        self._manifest = manifest
        self._placements = {p.spec.name: p for p in placements}
        self._arenas = list(arenas)
        #: Address of each tensor that lies in one piece. Looked at in every update: making views would take as long.
        self._addresses = {
            p.spec.name: self._arenas[p.blocks[0].arena].address + p.blocks[0].arena_offset
            for p in placements
            if not p.alias_reason(p.spec.dtype)
        }
        self._connection = connection
        self._aliased: dict[int, torch.nn.Parameter] = {}
        self._settled = False  # after the last move of a policy
        self._homes: tuple[list[torch.nn.Parameter], list[int]] = ([], [])  # where the aliased ones were then
        self._again: _Again | None = None
        self._watch = Watch()
        self._unwatched = False  # parameters were aliased since it was started

    @classmethod
    def connect(cls, handshake: Handshake, timeout_s: float) -> SharedTransport:
        """Fetch the arenas' descriptors and map them. Errors are those of `open_transport`."""
        sizes = handshake.arena_sizes
        devices = [device_named(gpu) for gpu in handshake.arena_gpus]
        placement.check(handshake.placements, sizes)  # before anything is mapped by it
        fds, connection = descriptors.receive(
            handshake.descriptor_socket, handshake.token, len(sizes), timeout_s
        )
        try:
            arenas = [Arena.open(*arena) for arena in zip(fds, sizes, devices, strict=True)]
        except BaseException:
            connection.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        return cls(handshake.manifest, handshake.placements, arenas, connection)

    @property
    def aliased(self) -> dict[int, torch.nn.Parameter]:
        return self._aliased

    def settled(self, policy: Sequence[SourceTensor]) -> bool:
        return all(self._in_place(source) for source in policy)

    def stands(self) -> bool:
        parameters, addresses = self._homes
        there = self._settled and list(map(torch.Tensor.data_ptr, parameters)) == addresses
        return there and all(map(torch.Tensor.is_contiguous, parameters))

    def mark(self) -> None:
        if self._unwatched:
            self._watch.start(p for p in self._aliased.values() if self._is_ours(p))
            self._unwatched = False
        else:  # a quarter of the time
            self._watch.renew()

    def disturbed(self) -> bool:
        return self._watch.changed()

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Chunk], None], *, digest: bool = False
    ) -> Moved:
        self.touched = False
        if self._again is not None and self._again.of(policy):
            return self._move_again(policy, self._again)
        moving = [source for source in policy if not self._in_place(source)]
        if moving:
            self._let_go_of_others({id(source.parameter) for source in policy})
        nbytes = sum(self._placements[source.name].spec.nbytes for source in moving)
        parts = [0] * len(self._manifest)
        if digest or moving:
            standing = [source for source in policy if self._in_place(source)]
            values = [source.read().detach() for source in standing]
            self._note(standing, digests.digest_tensors(values), parts)
            whole = [source for source in moving if source.parameter is not None]
            self._write(whole, parts)
            for source in moving:
                if source.parameter is None:  # one by one: no more fresh memory is held than a tensor's
                    self._write([source], parts)
        bound = [self._alias(source) for source in moving]
        if policy:
            self._settled = self.settled(policy)
            self._homes = (list(self._aliased.values()), [p.data_ptr() for p in self._aliased.values()])
        self._synchronize()
        if any(bound) and self._on_device():
            torch.cuda.empty_cache()  # the second copy: torch would keep it for tensors of the same sizes
        if len(moving) == len(policy) and not self._aliased:
            self._again = self._to_write(policy, nbytes)
        return Moved(nbytes, digests.combine(parts) if digest or moving else None)

    def _to_write(self, policy: Sequence[SourceTensor], nbytes: int) -> _Again | None:
        if any(source.parameter is None for source in policy):
            return None  # fresh memory each time
        write = again(self._items(policy), self._arenas)
        return None if write is None else _Again(policy, _where(policy), write, nbytes)

    def _move_again(self, policy: Sequence[SourceTensor], last: _Again) -> Moved:
        parts = [0] * len(self._manifest)
        self.touched = True
        self._note(policy, last.write(), parts)
        self._synchronize()
        return Moved(last.nbytes, digests.combine(parts))

    def _synchronize(self) -> None:
        for device in self._on_device():
            # What was written, by whomever here, must be there before the engine goes on.
            torch.cuda.synchronize(device)

    def _on_device(self) -> set[torch.device]:
        return {arena.device for arena in self._arenas if arena.device.type == "cuda"}

    def _items(self, sources: Sequence[SourceTensor]) -> list[tuple[Placement, torch.Tensor]]:
        return [(self._placements[source.name], source.read().detach()) for source in sources]

    def _write(self, sources: Sequence[SourceTensor], parts: list[int]) -> None:
        if sources:
            # One that lies in another's place, as where two changed theirs, is read before that is written.
            items = [(p, v.clone() if self._is_ours(v) else v) for p, v in self._items(sources)]
            self.touched = True
            self._note(sources, write(items, self._arenas), parts)

    def _note(self, sources: Sequence[SourceTensor], found: Sequence[int], parts: list[int]) -> None:
        for source, digest in zip(sources, found, strict=True):
            parts[self._manifest.positions[source.name]] = digest

    def close(self) -> None:
        aside: list[tuple[torch.nn.Parameter, torch.device]] = []
        try:
            self._let_go_of_others(set(), aside)
        finally:
            self._homes = ([], [])
            self._settled = False
            self._again = None
            self._watch.stop()
            self._arenas.clear()
            if self._connection is not None:
                self._connection.close()
                self._connection = None
        for parameter, device in aside:  # which has room for them now
            parameter.data = parameter.data.to(device)

    def _let_go_of_others(
        self, kept: set[int], aside: list[tuple[torch.nn.Parameter, torch.device]] | None = None
    ) -> None:
        """Give parameters that are not among these, by `id`, memory of their own, with the same values.

        Those for which their device has no room go into host memory, and with that device into `aside`; without that
        it is an error.
        """
        for key in self._aliased.keys() - kept:
            parameter = self._aliased[key]
            if self._is_ours(parameter):
                try:
                    parameter.data = parameter.data.clone()
                except torch.OutOfMemoryError:
                    if aside is None:
                        raise
                    aside.append((parameter, parameter.device))
                    parameter.data = parameter.data.to("cpu", copy=True)
            del self._aliased[key]
            self._unwatched = True

    def _in_place(self, source: SourceTensor) -> bool:
        """Whether the source is the engine's memory already. A parameter may have been given other memory
        since."""
        if source.parameter is None or id(source.parameter) not in self._aliased:
            return False
        if not self._may_alias(source):
            return False
        there = (
            source.parameter.data_ptr() == self._addresses[source.name] and source.parameter.is_contiguous()
        )
        return there or not source.spec.numel

    def _may_alias(self, source: SourceTensor) -> bool:
        same_dtype = source.spec.dtype == self._placements[source.name].spec.dtype
        return same_dtype and source.name in self._addresses

    def _alias(self, source: SourceTensor) -> bool:
        """Have it be the engine's memory if it can. Whether it is."""
        if source.parameter is None or not self._may_alias(source):
            return False
        source.parameter.data = self._placements[source.name].view(self._arenas)
        self._aliased[id(source.parameter)] = source.parameter
        self._unwatched = True
        return True

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        address = tensor.data_ptr()
        return any(arena.address <= address < arena.address + arena.size for arena in self._arenas)


@dataclass(frozen=True)
class _Again:
    """The last move, of parameters that were all written: while they are where they were, the next is the same."""

    policy: Sequence[SourceTensor]
    where: list[object]
    write: Callable[[], list[int]]
    nbytes: int

    def of(self, policy: Sequence[SourceTensor]) -> bool:
        same = len(policy) == len(self.policy) and all(map(operator.is_, policy, self.policy))
        return same and _where(policy) == self.where


def _where(policy: Sequence[SourceTensor]) -> list[object]:
    parameters: list[Any] = [source.parameter for source in policy]
    return [*map(torch.Tensor.data_ptr, parameters), *(parameter.dtype for parameter in parameters)]


def device_named(gpu: str) -> torch.device:
    """The device with this UUID, the host's for "".

    Raises:
        ValueError: this process does not see it. ImportError: what compiles the kernels for it is not there.
    """
    if not gpu:
        return torch.device("cpu")
    from weight_transfer.cuda.devices import device_of, require_kernels

    require_kernels()  # now, and not when half of an update is written
    return device_of(gpu)
