"""Writing tensors into the arenas, where their placements say, with a cast to the engine's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weight_transfer import digest as digests
from weight_transfer.arena import Arena
from weight_transfer.parts import sum_of
from weight_transfer.placement import Placement
from weight_transfer.scatter import Pair, scatter


def write(items: Sequence[tuple[Placement, torch.Tensor]], arenas: Sequence[Arena]) -> list[int]:
    """Write each tensor, of its placement's shape, into the arenas. Returns the digest of each as it was to be written.

    The digests are of what the caller means to write, not of what is then found there: that is for the engine to
    digest. On a CUDA device one kernel casts, scatters and digests in a single pass; the call returns when it is done.

    Raises:
        ValueError: as `scatter` does, for tensors in host memory.
    """
    if _on_one_device(items, arenas):
        from weight_transfer.cuda.write import write as write_on_device

        return write_on_device(items, arenas)
    found = [
        digests.digest_tensor(tensor.detach().to(getattr(torch, place.spec.dtype))) for place, tensor in items
    ]
    copy([pair for place, tensor in items for pair in place.pairs(arenas, tensor)])
    return found


def write_parts(items: Sequence[tuple[Placement, torch.Tensor]], arenas: Sequence[Arena]) -> list[int]:
    """`write` of a rank's blocks alone, which are of whole words. Returns the digest sum of each placement's blocks."""
    if _on_one_device(items, arenas):
        from weight_transfer.cuda.write import write_parts as write_on_device

        return write_on_device(items, arenas)
    found = [sum_of(place, tensor.detach().to(getattr(torch, place.spec.dtype))) for place, tensor in items]
    copy([pair for place, tensor in items for pair in place.pairs(arenas, tensor)])
    return found


def _on_one_device(items: Sequence[tuple[Placement, torch.Tensor]], arenas: Sequence[Arena]) -> bool:
    """Whether the kernel can reach all of it."""
    devices = {arena.device for arena in arenas}
    if len(devices) != 1 or not items:
        return False
    (device,) = devices
    return device.type == "cuda" and all(tensor.device == device for _, tensor in items)


def again(
    items: Sequence[tuple[Placement, torch.Tensor]], arenas: Sequence[Arena]
) -> Callable[[], list[int]] | None:
    """A quicker `write` for as long as each tensor stays where it is; None where there is none."""
    if not _on_one_device(items, arenas):
        return None
    from weight_transfer.cuda.write import again as again_on_device

    return again_on_device(items, arenas)


def scattering(
    items: Sequence[tuple[Placement, torch.Tensor]], arenas: Sequence[Arena]
) -> Callable[[], None]:
    """`write` of the same tensors into the same places again and again, without digests.

    On a CUDA device, where tensors and arenas are on the same one, it is done in the order of the current stream, and
    nothing is waited for.
    """
    device = arenas[0].device
    if device.type == "cuda" and all(tensor.device == device for _, tensor in items):
        from weight_transfer.cuda.write import scattering as scattering_on_device

        return scattering_on_device(items, arenas)
    pairs = [pair for place, tensor in items for pair in place.pairs(arenas, tensor)]
    return lambda: copy(pairs)


def copy(pairs: Sequence[Pair]) -> None:
    """Write each source into its destination, wherever both are. In host memory this is `scatter`, with its errors."""
    if all(tensor.device.type == "cpu" for pair in pairs for tensor in pair):
        scatter(pairs)
        return
    for source, destination in pairs:
        destination.copy_(source)
