"""What ranks of one run say to each other."""

from __future__ import annotations

import json
from datetime import timedelta

import torch
import torch.distributed as dist

from tandem.errors import CATALOGUE, Reason, TandemError

#: Within which every rank must have said what all wait for.
ANSWER_S = 120.0
#: Within which the main process must have said what comes next: it may be waiting for an engine.
ORDER_S = 1800.0
_LONGEST = 4000  # characters of what a rank says of an error


class OtherRankError(RuntimeError):
    """Another rank failed. The message says with what."""


class OutOfStepError(RuntimeError):
    """This rank has left a collective that others may be waiting in: with them it can do nothing more but end."""

    @classmethod
    def at(cls, tensor: str, error: Exception) -> OutOfStepError:
        """It left as this tensor was gathered."""
        return cls(f"{tensor} could not be gathered: {type(error).__name__}: {error}")


class Ranks:
    """The ranks of one run, and words among them, each wait with a deadline.

    They go over gloo, whatever the run's tensors travel by: who waits in NCCL keeps a GPU busy that engines may share.
    """

    def __init__(self, wait_s: float = ANSWER_S) -> None:
        """Every rank must call this, in a run that torch.distributed knows. wait_s: the deadline."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s))
        self.count = dist.get_world_size()
        self.mine = dist.get_rank()

    def meet(self) -> None:
        """Return once all are here. Every rank must call this."""
        dist.barrier(self._group)

    def tell(self, data: bytes = b"") -> bytes:
        """What the main process says. Every rank must call this."""
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, self._group)
        said = _bytes(data, int(length.item()))
        dist.broadcast(said, 0, self._group)
        return _plain(said)

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank says, on all of them. Every rank must call this."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(lengths, torch.tensor([len(data)]), self._group)
        sizes = [int(length.item()) for length in lengths]
        said = [torch.zeros(max(sizes), dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(said, _bytes(data, max(sizes)), self._group)
        return [_plain(one[:size]) for one, size in zip(said, sizes, strict=True)]

    def agree(self, error: Exception | None) -> None:
        """Return where no rank has an error. Every rank must call this.

        Raises:
            TandemError, OtherRankError: another rank has one, as `heard`. And `error` itself.
        """
        failures = self.gather(b"" if error is None else self.said(error))
        if error is not None:
            raise error
        raise_for(failures)

    def said(self, error: Exception) -> bytes:
        """`error` as this rank's, for the others."""
        return said(error, f"{{}} (rank {self.mine})")


def said(error: BaseException, words: str = "{}") -> bytes:
    """An error for other ranks, which `heard` makes one of again. `words` go around the first of its own."""
    reason, text = "", f"{type(error).__name__}: {error}"
    if isinstance(error, TandemError):
        reason, text = str(error.reason), error.message
    return json.dumps({"reason": reason, "text": words.format(text[:_LONGEST])}).encode()


def heard(message: bytes) -> Exception:
    """The error that another rank told: a TandemError with its class and reason, or an OtherRankError."""
    told = json.loads(message)
    if told["reason"] in CATALOGUE:
        reason = Reason(told["reason"])
        return CATALOGUE[reason](reason, told["text"])
    return OtherRankError(told["text"])


def raise_for(failures: list[bytes]) -> None:
    """Raise the first that is one among these, which `said` made."""
    for failure in filter(None, failures):
        raise heard(failure)


def _bytes(data: bytes, length: int) -> torch.Tensor:
    padded = data[:length].ljust(length, b"\0")
    return (
        torch.frombuffer(bytearray(padded), dtype=torch.uint8)
        if length
        else torch.zeros(0, dtype=torch.uint8)
    )


def _plain(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
