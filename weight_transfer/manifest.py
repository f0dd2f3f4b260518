"""The manifest: the ordered list of the policy's tensors, and how a trainer's compares with the engine's."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

#: Bytes of one element, by torch's name of the dtype.
ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

#: The dtypes that are cast among each other on the way to the engine.
CASTABLE = frozenset({"float64", "float32", "float16", "bfloat16"})


_ALIGNMENT = 256


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in the checkpoint, its dtype as torch names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Mismatch:
    """What is wrong with one tensor of a trainer."""

    name: str
    problem: str


@dataclass(frozen=True)
class Manifest:
    """The policy's tensors, in the order in which digests read them."""

    tensors: tuple[TensorSpec, ...]

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def digest(self) -> int:
        """64 bits over names, dtypes and shapes, in order."""
        text = "\n".join(f"{t.name}\t{t.dtype}\t{','.join(map(str, t.shape))}" for t in self.tensors)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    @cached_property
    def positions(self) -> dict[str, int]:
        """Each name's place in the order."""
        return {t.name: i for i, t in enumerate(self.tensors)}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins when all lie in one block of memory, each aligned; and behind them, its size."""
        aligned = [-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in self.tensors]
        return tuple(itertools.accumulate(aligned, initial=0))


def mismatches(engine: Manifest, trainer: Sequence[TensorSpec]) -> list[Mismatch]:
    """Everything in which `trainer`'s tensors are not those of `engine`: a second try finds nothing new.

    Order does not matter. Floating dtypes may differ, since they are cast; any other dtype must be the
    engine's.
    """
    found = [
        Mismatch(name, f"given {count} times")
        for name, count in Counter(t.name for t in trainer).items()
        if count > 1
    ]
    given = {t.name: t for t in trainer}
    for want in engine:
        have = given.pop(want.name, None)
        if have is None:
            found.append(Mismatch(want.name, f"missing; the engine has {want.dtype}{list(want.shape)}"))
            continue
        if have.shape != want.shape:
            found.append(
                Mismatch(want.name, f"shape {list(have.shape)} is not the engine's {list(want.shape)}")
            )
        if have.dtype != want.dtype and not {have.dtype, want.dtype} <= CASTABLE:
            found.append(Mismatch(want.name, f"dtype {have.dtype} cannot become the engine's {want.dtype}"))
    found += [Mismatch(name, "unexpected; the engine has no such tensor") for name in given]
    return found
