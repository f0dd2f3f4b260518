"""The ranks of one run as writers of one engine's memory, where the engine has several workers.

Each rank writes the blocks of its own GPU's worker, and no rank writes for another. The main process has the session
and the lease. What it does with them it tells the others, who follow it within `sync_weights`. Each adds up the words
that it wrote, and the main process commits with the digest that these sums make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tandem.errors import FailedPrecondition, Reason
from tandem.weights.v1 import weights_pb2 as pb
from trainer_service.cuts import Reader
from trainer_service.listing import Listing
from trainer_service.ranks import ORDER_S, OutOfStepError, Ranks, raise_for
from trainer_service.session import handshake_of, identity_of, manifest_of
from trainer_service.shards import Gathering, elements_by_rank
from weight_transfer import digest as digests
from weight_transfer.manifest import Manifest
from weight_transfer.parts import why_not_summed
from weight_transfer.placement import Block, Placement, extent
from weight_transfer.transports import Moved, Piece, SourceTensor, WeightTransport
from weight_transfer.transports.part import Part, Value

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

JOIN, WRITE = -2, -3
_CONNECT_S = 30.0


class Together:
    """The same on every rank. The main process gives orders, which the others carry out in `Gathering.follow`."""

    def __init__(
        self, accelerator: Accelerator, gathering: Gathering, model: Callable[[], nn.Module]
    ) -> None:
        """Every rank must call this.

        Args:
            accelerator: of the run.
            gathering: how the ranks follow the main process.
            model: gives the policy as it is now.
        """
        self._ranks = Ranks()
        self._gathering = gathering
        self._model = model
        self._listing = Listing()
        mine = identity_of([str(accelerator.device)])
        #: Where each rank lives.
        self.identities = [
            pb.ProcessIdentity.FromString(said) for said in self._ranks.gather(mine.SerializeToString())
        ]
        self.touched = False  # some rank may have written in the last update
        self._shared: _Shared | None = None
        gathering.obey({JOIN: self._join, WRITE: self._write}, Ranks(ORDER_S))

    def join(
        self, request: pb.OpenSessionRequest, manifest: pb.Manifest, answer: pb.OpenSessionResponse
    ) -> WeightTransport:
        """In the main process: have every rank map its part of the engine's memory, in a session that was opened.

        Raises:
            FailedPrecondition: TRANSPORT_UNAVAILABLE, the others are not following. TandemError, OtherRankError: one
            could not. And what `open_transport` raises.
        """
        if not self._gathering.leads:
            raise FailedPrecondition(
                Reason.TRANSPORT_UNAVAILABLE,
                "The ranks write the engine's memory together, which they do in sync_weights alone: an engine that "
                "went away since cannot be given its weights again before the next. Go on from a checkpoint.",
            )
        self._gathering.order(JOIN)
        self._join(request, manifest, answer)
        return _Led(self)

    def _join(
        self,
        request: pb.OpenSessionRequest | None = None,
        manifest: pb.Manifest | None = None,
        answer: pb.OpenSessionResponse | None = None,
    ) -> None:
        self.leave()
        said = [
            self._ranks.tell(b"" if one is None else one.SerializeToString())
            for one in (request, manifest, answer)
        ]
        asked, opened = pb.OpenSessionRequest.FromString(said[0]), pb.OpenSessionResponse.FromString(said[2])
        error: Exception | None = None
        try:
            manifest = pb.Manifest.FromString(said[1])
            self._shared = _Shared(asked, manifest_of(manifest), opened, self.identities, self._ranks.mine)
        except Exception as raised:  # noqa: BLE001  all ranks are told
            error = raised
        try:
            self._ranks.agree(error)
        except BaseException:
            self.leave()
            raise

    def write(self) -> Moved:
        """In the main process: have every rank write its part of the policy as it is now.

        Raises:
            TandemError, OtherRankError: another rank could not. And what went wrong here.
        """
        self._gathering.order(WRITE)
        return self._write()

    def _write(self) -> Moved:
        shared, self.touched = self._shared, False
        error: Exception | None = None
        here: dict[str, Value] = {}
        missing: list[SourceTensor] = []
        try:
            if shared is None:
                raise RuntimeError("this rank has no part of the engine's memory")
            here, missing = shared.listed(self._listing.policy(self._model(), shared.names))
        except Exception as raised:  # noqa: BLE001
            error = raised
        self._ranks.agree(error)  # before anybody waits for a tensor
        assert shared is not None  # noqa: S101  for the type checker
        self.touched = True
        sums, error = self._write_all(shared, here, missing)
        said = self._ranks.gather(shared.packed(sums) + (b"" if error is None else self._ranks.said(error)))
        if error is not None:
            raise error
        raise_for([shared.failure_in(one) for one in said])
        return Moved(shared.manifest.nbytes, shared.digest(said))

    def _write_all(
        self, shared: _Shared, here: dict[str, Value], missing: list[SourceTensor]
    ) -> tuple[dict[str, int], Exception | None]:
        """Write everything. Where that fails, go on reading with the others, who wait for it.

        Raises:
            OutOfStepError: a tensor could not be gathered.
        """
        sums: dict[str, int] = {}
        failed: list[Exception] = []

        def write(values: dict[str, Value]) -> None:
            try:
                if not failed:
                    sums.update(shared.write(values))
            except Exception as raised:  # noqa: BLE001
                failed.append(raised)

        write(here)
        spread, reader = self._gathering.spread(), Reader()
        for source in missing:
            try:
                value = reader.read(source).detach()
            except Exception as raised:
                failed.append(raised)
                if spread:
                    self.leave()  # ends the update now: the others may wait for this tensor
                    raise OutOfStepError.at(source.name, raised) from raised
            else:
                # One by one: no more fresh memory is held than a tensor's.
                write({source.name: (value, 0)})
                del value
        try:
            shared.part.synchronize()
        except Exception as raised:  # noqa: BLE001
            failed.append(raised)
        return sums, failed[0] if failed else None

    def digest(self, policy: Sequence[SourceTensor]) -> int:
        """In the main process: the policy's digest in the engine's dtypes, read here."""
        assert self._shared is not None  # noqa: S101  for the type checker
        from weight_transfer.transports.base import digest_of

        return digest_of(self._shared.manifest, policy)

    def leave(self) -> None:
        """Let go of the engine's memory. The session is over then, for all ranks."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.part.close()


class _Shared:
    """One session's memory, as a rank has it."""

    def __init__(
        self,
        asked: pb.OpenSessionRequest,
        manifest: Manifest,
        opened: pb.OpenSessionResponse,
        identities: Sequence[pb.ProcessIdentity],
        mine: int,
    ) -> None:
        self.manifest = manifest
        self.names = [spec.name for spec in manifest]
        handshake = handshake_of("shared", opened, manifest, [tensor.name for tensor in asked.tensors])
        writers = [writer_of(arena, identities) for arena in opened.shared.arenas]
        self._placements = {placement.spec.name: placement for placement in handshake.placements}
        self._ranges = _ranges(handshake.placements, writers, len(identities))
        #: Those whose parts don't add up: the main process digests them whole.
        self._whole = {name for name, placement in self._placements.items() if why_not_summed(placement)}
        self._mine = mine
        self.part = Part.connect(handshake, [i for i, rank in enumerate(writers) if rank == mine], _CONNECT_S)

    def listed(self, policy: Sequence[SourceTensor]) -> tuple[dict[str, Value], list[SourceTensor]]:
        """What every rank writes its blocks from, since it has that; and what is gathered or merged, in one order."""
        sources = {source.name: source for source in policy}
        here = {name: value for name in self.names if (value := self._here(sources[name])) is not None}
        # In the policy's order, in which pieces of one parameter follow each other.
        return here, [
            source for source in policy if source.name in self._placements and source.name not in here
        ]

    def _here(self, source: SourceTensor) -> Value | None:
        if source.parameter is not None:
            return source.parameter, 0
        if source.shard is None or source.name in self._whole:
            return None
        shares = elements_by_rank(source.shard)
        needed = self._ranges[source.name]
        if shares is None or len(shares) != len(needed):
            return None
        if any(
            not (first <= low and high <= end)
            for (first, end), (low, high) in zip(shares, needed, strict=True)
            if low < high
        ):
            return None
        return source.shard.detach().to_local(), shares[self._mine][0]

    def write(self, values: dict[str, Value]) -> dict[str, int]:
        """Write our blocks. Returns the sums of what we count. Where a tensor's don't add up, the main process has its
        digest in their place."""
        sums = self.part.write(values)
        for name in self._whole & values.keys():
            sums[name] = 0
            if self._mine == 0:
                dtype = getattr(torch, self._placements[name].spec.dtype)
                sums[name] = digests.digest_tensor(values[name][0].detach().to(dtype))
        return sums

    def packed(self, sums: dict[str, int]) -> bytes:
        """The sums, in the manifest's order."""
        return np.array([sums.get(spec.name, 0) for spec in self.manifest], np.uint64).tobytes()

    def failure_in(self, said: bytes) -> bytes:
        """What a rank said behind its sums."""
        return said[8 * len(self.manifest) :]

    def digest(self, said: Sequence[bytes]) -> int:
        """Of the policy, of all ranks' sums."""
        each = [np.frombuffer(one, np.uint64, len(self.manifest)) for one in said]
        totals: Any = np.sum(each, axis=0, dtype=np.uint64)
        nbytes = np.array([spec.nbytes for spec in self.manifest], np.uint64)
        found = digests.finished(totals, nbytes)
        for name in self._whole:
            i = self.manifest.positions[name]
            found[i] = int(each[0][i])
        return digests.combine(found)


class _Led(WeightTransport):
    """The main process's end: a move is every rank's."""

    name = "shared"

    def __init__(self, together: Together) -> None:
        self._together = together

    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        self.touched = False
        try:
            return self._together.write()
        finally:
            self.touched = self._together.touched

    def digest(self, policy: Sequence[SourceTensor]) -> int:
        return self._together.digest(policy)

    def close(self) -> None:
        self._together.leave()


def writer_of(arena: pb.Arena, identities: Sequence[pb.ProcessIdentity]) -> int:
    """The rank that writes an arena: the first on its GPU; of those in the host's memory, each its share."""
    if not arena.gpu_uuid:
        return int(arena.rank) % len(identities)
    for rank, identity in enumerate(identities):
        if arena.gpu_uuid in identity.gpu_uuids:
            return rank
    raise ValueError(f"no rank of the trainer is on {arena.gpu_uuid}, which the engine is on")


def _ranges(
    placements: Sequence[Placement], writers: Sequence[int], ranks: int
) -> dict[str, list[tuple[int, int]]]:
    """Of each tensor the elements between which each rank's blocks lie: first, and one past the last."""

    def between(blocks: Iterator[Block]) -> tuple[int, int]:
        ends = [
            (b.tensor_offset, b.tensor_offset + extent(b.shape, b.tensor_strides)) for b in blocks if b.numel
        ]
        return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0, 0)

    return {
        p.spec.name: [between(b for b in p.blocks if writers[b.arena] == rank) for rank in range(ranks)]
        for p in placements
    }
