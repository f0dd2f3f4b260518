"""What a transport is in the service: the engine's end of the way on which one update's bytes come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tandem.errors import DataLoss, FailedPrecondition, Reason, invalid

if TYPE_CHECKING:
    from inference_service.staging import MappedStaging
    from inference_service.trained import TrainedAdapter
    from inference_service.transports.nccl import Invitation
    from weight_transfer.sparse import Packed

SHARED, NCCL, STREAM, CHECKPOINT = "shared", "nccl", "stream", "checkpoint"


@dataclass(frozen=True)
class Way:
    """How one update's bytes come.

    transport: by which transport; "checkpoint" where the engine has them itself.
    in_place: whether they go straight into the live weights, the engine being idle from begin to end; else they are
        staged beside them while it serves.
    partial: whether what is not sent stays as it is in the base version.
    adapter: what comes in place of the policy, if anything does.
    stage: the memory that a trainer on this host writes, where it is not the engine's own.
    invitation: to a trainer's communicator, where they come by NCCL.
    """

    transport: str
    in_place: bool
    partial: bool = False
    adapter: TrainedAdapter | None = None
    stage: MappedStaging | None = None
    invitation: Invitation | None = None


class Incoming(ABC):
    """One update's bytes on their way into the engine.

    `open` comes first, then `expect`, `check` and `install`, each at most once, and at every update's end `release`.
    """

    #: Whether the engine's weights are what it carries, and not an adapter beside them.
    of_policy: ClassVar[bool] = True
    #: Whether what vLLM alone can place must be loaded anew after `install`.
    reloads: ClassVar[bool] = True
    #: Whether nobody else writes the live weights, so that what is `touched` is known here.
    writes: ClassVar[bool] = False
    #: Whether bytes were written into the live weights before `install`.
    touched: bool = False

    async def open(self) -> None:  # noqa: B027  # most have nothing to do
        """Do what takes time before bytes can come, while generation goes on.

        Raises:
            Aborted: LEASE_LOST, the other side did not come.
        """

    def expect(self) -> None:  # noqa: B027
        """From now on bytes may come. In place, generation stands still."""

    def chunk(self, tensor: int, offset: int, data: bytes) -> None:
        """Take a piece of a tensor: its index in the manifest, the first byte, and the bytes.

        Raises:
            FailedPrecondition: UPDATE_ORDER, out of order, or such bytes don't come this way.
            InvalidArgument: no such tensor, or past its end.
        """
        raise FailedPrecondition(Reason.UPDATE_ORDER, "chunks belong to the stream transport")

    def changes(self, packed: Packed) -> None:
        """Take elements of a tensor that changed. Raises as `chunk` does."""
        raise FailedPrecondition(Reason.UPDATE_ORDER, "sparse chunks belong to partial updates")

    async def arrived(self) -> None:  # noqa: B027
        """Wait until nothing is under way that comes by itself, and not in messages: the trainer is still needed."""

    @property
    def coming(self) -> bool:
        """Whether something is, so that `arrived` waits."""
        return False

    @abstractmethod
    async def check(self, digest: int | None) -> None:
        """See that everything is there, and is what the trainer has.

        Staged, generation goes on meanwhile, and nothing that can be foreseen makes `install` fail afterwards.

        Args:
            digest: of all that the update carries, as the trainer has it. None where no byte moved.

        Raises:
            DataLoss: DIGEST_MISMATCH. FailedPrecondition: UPDATE_ORDER, bytes are missing.
        """

    @abstractmethod
    async def install(self) -> None:
        """Have what was staged be what the engine computes with. Generation stands still."""

    async def undo(self) -> bool:
        """Have the engine's memory be again what it was before `install`, which failed, or something after it did.

        Returns:
            Whether it is.
        """
        return False

    @abstractmethod
    def release(self) -> None:
        """End what is under way, and give back the memory that the update needed, as far as that takes no time."""

    async def give_back(self) -> None:  # noqa: B027
        """Give back the rest, once generation goes on."""


def compare(told: int | None, found: int) -> None:
    """Raise where a trainer's digest is not that of what was found here."""
    if told is None:
        raise invalid("commit.digest", "required, since bytes moved")
    if told != found:
        raise DataLoss(
            Reason.DIGEST_MISMATCH,
            f"the trainer's weights have digest {told:016x}, those received {found:016x}",
            metadata={"trainer": f"{told:016x}", "engine": f"{found:016x}"},
        )
