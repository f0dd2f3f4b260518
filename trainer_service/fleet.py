"""One policy to several inference services by NCCL: each has a communicator of its own, and they share what is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from tandem.errors import Aborted, TandemError
from trainer_service.client import InferenceClient
from trainer_service.member import Member, went_away
from weight_transfer import digest as digests
from weight_transfer.cuda.nccl import NcclError
from weight_transfer.cuda.several import End, Several
from weight_transfer.transports import Moved, SourceTensor, TransportError
from weight_transfer.transports.nccl import NcclTransport
from weight_transfer.transports.outgoing import Buckets, Layout, Mirror, Outgoing, mirrored

_TRIES = 2


class Fleet:
    """Engines of one layout are sent the same memory at the same time; those of different layouts one after the other.

    A parameter can be in one mirror alone. All layouts but the first that has it go through buckets.
    """

    def __init__(self) -> None:
        """Nothing is allocated before the first `move`."""
        self._outgoing: list[tuple[Layout, Outgoing]] = []
        self._failures: Counter[InferenceClient] = Counter()

    def move(self, members: Sequence[Member], policy: Sequence[SourceTensor]) -> Moved:
        """Bring the policy to members whose updates are ready, at least one. Those that go away meanwhile are dropped.

        Raises:
            TandemError: one of them refuses it.
        """
        groups: dict[Outgoing, list[Member]] = {}
        for member in members:
            groups.setdefault(self._for(_way(member), policy), []).append(member)
        moved = Moved(0, None)
        for outgoing, group in groups.items():
            ends = [End(_way(m).communicator, m.check, partial(self.broke, m)) for m in group]
            layout = _way(group[0]).layout
            by_index = {layout.manifest.positions[source.name]: source for source in policy}
            parts = outgoing.send(by_index, Several(ends), lambda: None)
            moved = Moved(layout.nbytes, digests.combine(parts))
        return moved

    def broke(self, member: Member, error: Exception) -> None:
        """A member's communicator is no more, or was not to be had. It is dropped.

        Raises:
            TandemError: `error`, if the service refuses what the others would take too.
        """
        if isinstance(error, NcclError | TransportError):
            self._failures[member.client] += 1
        elif not isinstance(error, TandemError) or not (
            member.lost or went_away(error) or isinstance(error, Aborted)
        ):
            raise error
        elif not member.lost and isinstance(error, Aborted):
            self._failures[member.client] += 1
        member.drop(f"NCCL: {error}")

    def fails(self, client: InferenceClient) -> bool:
        """Whether NCCL to a service that is there failed again and again: it is to be tried no more."""
        return self._failures[client] >= _TRIES

    def succeeded(self, members: Sequence[Member]) -> None:
        """These have committed."""
        for member in members:
            self._failures.pop(member.client, None)

    def close(self) -> None:
        """Give the memory back. Parameters get their own again."""
        for _, outgoing in self._outgoing:
            outgoing.close()
        self._outgoing.clear()

    def _for(self, way: NcclTransport, policy: Sequence[SourceTensor]) -> Outgoing:
        for layout, outgoing in self._outgoing:
            if layout is way.layout or layout == way.layout:
                way.layout = layout  # the next look is quicker
                return outgoing
        taken = any(isinstance(outgoing, Mirror) for _, outgoing in self._outgoing)
        kind = Mirror if mirrored(way.layout.manifest, policy) and not taken else Buckets
        outgoing = kind(way.layout)
        self._outgoing.append((way.layout, outgoing))
        return outgoing


def over_nccl(member: Member) -> bool:
    """Whether a member's session is by NCCL."""
    return isinstance(member.session.transport, NcclTransport)


def _way(member: Member) -> NcclTransport:
    way = member.session.transport
    assert isinstance(way, NcclTransport)  # noqa: S101  as `over_nccl` told
    return way
