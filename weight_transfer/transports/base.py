"""What a transport is: the trainer's end of the way on which one update's bytes move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from weight_transfer import digest as digests
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Placement

if TYPE_CHECKING:
    import torch

    from weight_transfer.sparse import Packed


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the policy as the trainer holds it.

    `read` returns its value now, of the spec's dtype and shape; the result may be fresh memory, and is
    dropped before the next tensor is read. `parameter` is set where the value is a parameter of the model as
    it stands, which may therefore become a view of the engine's memory. `device` is where the policy holds it, as torch
    names it. `shard` is set where `read` gathers it, plainly, from ranks that each have a part of it.
    """

    spec: TensorSpec
    read: Callable[[], torch.Tensor]
    parameter: torch.nn.Parameter | None = None
    device: str = "cpu"
    shard: Any = None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: index in the manifest, first byte, and row-major bytes in the engine's dtype."""

    tensor: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Sum:
    """The digest of all that an update brings, while the last of that is on its way by itself."""

    digest: int


#: What travels in an update's stream.
Piece: TypeAlias = "Chunk | Packed | Sum"


class TransportError(RuntimeError):
    """The way to the engine broke off. It can be made anew."""


@dataclass(frozen=True)
class Moved:
    """What one update moved: bytes, in the engine's dtype or packed, and the whole policy's digest where any did.

    changed: how many elements had changed, where these alone were looked for.
    """

    nbytes: int
    digest: int | None
    changed: int | None = None


@dataclass(frozen=True)
class Handshake:
    """What the service answered to a trainer: which transport, and what that needs."""

    transport: str
    manifest: Manifest
    max_chunk_bytes: int = 0
    descriptor_socket: str = ""
    token: bytes = b""
    arena_sizes: tuple[int, ...] = ()
    arena_gpus: tuple[str, ...] = ()  # UUIDs; "" for host memory
    placements: tuple[Placement, ...] = ()
    staged: bool = False  # shared: what is mapped is not the engine's own memory
    partial: bool = False  # stream, nccl: updates shall carry changes alone
    window_bytes: int = 0  # nccl
    ranks: int = 2  # nccl: of the communicator, the trainer's among them
    device: str = ""  # nccl: the trainer's GPU, as torch names it


class WeightTransport(ABC):
    """One session's way of moving weights."""

    name: ClassVar[str]
    _manifest: Manifest

    #: Whether the last `move` wrote into memory that the engine computes with.
    touched: bool = False

    @property
    def aliased(self) -> dict[int, torch.nn.Parameter]:
        """The parameters that are engine memory now, by `id`: whoever writes them needs the lease."""
        return {}

    def settled(self, policy: Sequence[SourceTensor]) -> bool:
        """Whether the engine's memory holds `policy` as it is, so that an update has nothing to move."""
        return False

    def mark(self) -> None:
        """What was moved last is committed: `disturbed` and `partial` compare with that."""
        return

    def disturbed(self) -> bool:
        """Whether aliased parameters were written since `mark`, as far as a sample of them tells."""
        return False

    def digest(self, policy: Sequence[SourceTensor]) -> int:
        """The policy's digest in the engine's dtypes. Reads alone, so that it needs no lease.

        Fresh memory is held for one tensor at a time.
        """
        return digest_of(self._manifest, policy)

    def stands(self) -> bool:
        """Whether the last `move` left every tensor in the engine's memory, or in what is sent, and all are there yet.

        Then `move` needs no policy. Quicker to tell than `settled`, which looks at the policy as it is now.
        """
        return False

    @property
    def partial(self) -> bool:
        """Whether the next `move` brings what changed since `mark` alone: its update must be begun as partial."""
        return False

    def forget(self) -> None:
        """Have the next `move` bring everything: the engine may hold something else than was moved last."""
        return

    def leave(self) -> None:
        """Have the next update meet the engine's side anew: it may have gone away from this one's."""
        return

    def invitation(self) -> bytes:
        """What the next update's begin must carry, so that the engine can `join`; b"" where there is no need.

        Raises:
            TransportError: there is no way to meet.
        """
        return b""

    def join(self, alive: Callable[[], None]) -> None:
        """Meet the engine's side of an update that is being begun. `alive` raises once that has ended, until the next.

        Raises:
            TransportError: the engine's side did not come.
        """
        return

    def ahead(self) -> None:
        """Begin with what `stands`, in an update that is being begun, after `join`: the engine takes it when it may.

        Raises:
            TransportError: the engine's side went away.
        """
        return

    def withdraw(self) -> None:
        """The update was not begun after all: take back what went `ahead`."""
        return

    @abstractmethod
    def move(
        self, policy: Sequence[SourceTensor], send: Callable[[Piece], None], *, digest: bool = False
    ) -> Moved:
        """Bring `policy` to the engine, within an update that is ready: without the lease, call `digest`.

        Args:
            policy: all tensors of the manifest, in any order; none where the transport `stands`.
            send: puts a piece in the update's stream; blocks while the service is behind. A `Sum` is the last.
            digest: whether to digest the policy even where no byte moved.

        Raises:
            TransportError: the engine's side went away.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the engine's memory. Parameters in it get their own, with the same values."""


def digest_of(manifest: Manifest, policy: Sequence[SourceTensor]) -> int:
    """Digest of `policy`, tensors of the manifest in any order, in the manifest's dtypes.

    Fresh memory is held for one tensor at a time.
    """
    import torch

    parts = [0] * len(manifest)
    for source in policy:
        index = manifest.positions[source.name]
        dtype = getattr(torch, manifest.tensors[index].dtype)
        parts[index] = digests.digest_tensor(source.read().detach().to(dtype))
    return digests.combine(parts)
