"""Elements of a tensor that changed: how they are found, and how they travel.

Bits are compared and carried, never values: a NaN keeps its payload, and -0.0 is not 0.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

#: zstd's level: higher ones cost several times the time for some percent of the bytes. docs/weight-plane.md has both.
LEVEL = 1
_Array: TypeAlias = "np.ndarray[Any, Any]"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GAPS: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
#: Bytes of a gap at most, for the room that an element takes.
_WIDEST = max(_GAPS)


class Changes(NamedTuple):
    """Elements of one tensor: its index in the manifest, theirs in row-major order (int64, rising), their bits."""

    tensor: int
    indices: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """Changes as they travel.

    first: index of the first element. count: how many. gap_bytes: of each gap. data: for each element but the first,
    how many lie between it and the one before, and then every element's bits; both little-endian, the lowest bytes of
    all first, then the next; compressed by zstd if `compressed`.
    """

    tensor: int
    first: int
    count: int
    gap_bytes: int
    compressed: bool
    data: bytes


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor as integers of their size, in one dimension, in the same memory."""
    return tensor.detach().view(-1).view(_BITS[tensor.element_size()])


def changed(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Where `now` differs from `before`, both as `bits` gives them: indices, rising, where the tensors are."""
    if now.device.type == "cpu":  # numpy takes a third to a tenth of torch's time
        return torch.from_numpy(np.flatnonzero(now.numpy() != before.numpy()))
    return torch.ne(now, before).nonzero().view(-1)


def pack(changes: Changes, max_bytes: int) -> Iterator[Packed]:
    """Cut into pieces that each unpack to at most `max_bytes`."""
    import zstandard  # here: who moves nothing but whole tensors needs none

    indices = changes.indices.cpu().numpy()
    values = changes.values.cpu().numpy()
    size = values.dtype.itemsize
    most = max(max_bytes // (size + _WIDEST), 1)
    for start in range(0, len(indices), most):
        piece = indices[start : start + most]
        gaps = np.diff(piece) - 1
        widest = int(gaps.max(initial=0))
        width = next(width for width in _GAPS if widest < 1 << 8 * width)
        raw = _planes(gaps.astype(_GAPS[width])) + _planes(values[start : start + most])
        small = zstandard.ZstdCompressor(level=LEVEL).compress(raw)
        compressed = len(small) < len(raw)
        yield Packed(
            changes.tensor, int(piece[0]), len(piece), width, compressed, small if compressed else raw
        )


def unpack(packed: Packed, numel: int, itemsize: int, max_bytes: int) -> Changes:
    """What `pack` packed, of a tensor of `numel` elements of `itemsize` bytes.

    Raises:
        ValueError: it is no such thing, or needs more than `max_bytes`. It comes from another process: nothing is
            trusted, and no more memory is taken than that.
    """
    if packed.gap_bytes not in _GAPS:
        raise ValueError(f"gaps have {', '.join(map(str, _GAPS))} bytes, not {packed.gap_bytes}")
    if packed.count < 1:
        raise ValueError("it has no elements")
    if packed.first >= numel:
        raise ValueError(f"the tensor has {numel} elements, not {packed.first + 1}")
    gaps = (packed.count - 1) * packed.gap_bytes
    size = gaps + packed.count * itemsize
    if size > max_bytes:
        raise ValueError(f"it unpacks to {size} bytes, the limit is {max_bytes}")
    raw = _decompressed(packed.data, size) if packed.compressed else packed.data
    if len(raw) != size:
        raise ValueError(f"it has {len(raw)} bytes, where {packed.count} elements have {size}")
    between = _joined(raw[:gaps], packed.gap_bytes).view(_GAPS[packed.gap_bytes])
    indices = np.empty(packed.count, np.int64)
    indices[0] = packed.first
    np.add(between, 1, out=indices[1:], dtype=np.int64)
    np.cumsum(indices, out=indices)
    if indices[-1] >= numel:
        raise ValueError(f"the tensor has {numel} elements, not {indices[-1] + 1}")
    values = torch.from_numpy(_joined(raw[gaps:], itemsize)).view(_BITS[itemsize])
    return Changes(packed.tensor, torch.from_numpy(indices), values)


def _decompressed(data: bytes, size: int) -> bytes:
    import zstandard

    try:
        # Before anything is allocated: the frame says itself how large it becomes.
        if zstandard.get_frame_parameters(data).content_size != size:
            raise ValueError(f"its frame does not unpack to {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"it is not zstd's: {error}") from error


def _planes(array: _Array) -> bytes:
    """The array's lowest bytes, then the next, …: alike ones together, which packs better."""
    bytewise = array.view(np.uint8).reshape(-1, array.dtype.itemsize)
    planes = np.empty(bytewise.shape[::-1], np.uint8)
    for k, plane in enumerate(planes):  # one by one: numpy's copy of the transpose takes ten times as long
        plane[:] = bytewise[:, k]
    return planes.tobytes()


def _joined(planes: bytes, itemsize: int) -> _Array:
    """Bytes of the array of which these are the planes."""
    bytewise = np.empty((len(planes) // itemsize, itemsize), np.uint8)
    for k, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(itemsize, -1)):
        bytewise[:, k] = plane
    return bytewise.reshape(-1)
