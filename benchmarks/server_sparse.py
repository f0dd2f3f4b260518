"""Updates by NCCL that bring what changed alone, by the share that changed: a part of `benchmarks.server_mode`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.measure import ROUNDS, WARM_UPS, percentiles
from trainer_service.weights import PolicyWeights
from weight_transfer.arena import Arena
from weight_transfer.patches import patch
from weight_transfer.sparse import bits
from weight_transfer.tiles import HEADER
from weight_transfer.transports.nccl_sparse import SparseMirror

#: What a step of reinforcement learning changes is the first; where time breaks even is looked for with the others.
SHARES = (0.01, 0.0, 0.001, 0.05, 0.1, 0.2)


def changes(policy: Any, weights: PolicyWeights) -> dict[str, Any]:
    """Milliseconds and bytes of updates after which this share of the elements has other bits.

    Changing them is not measured. The first updates of a share set how much room there is for changes.
    """
    weights.sync()  # whole
    found: dict[str, Any] = {}
    for share in SHARES:
        for _ in range(WARM_UPS + ROUNDS):
            change(policy.parameters(), share)
            torch.cuda.synchronize(policy.device)
            weights.sync()
        last = list(weights.history)[-ROUNDS:]
        took = percentiles([update.seconds * 1e3 for update in last])
        parts = {
            f"{name}_p50": statistics.median(getattr(update, name) for update in last) * 1e3
            for name in ("ready", "committed", "stopped")
        }
        found[f"{share:g}"] = took | parts | {"nbytes": last[-1].nbytes, "changed": last[-1].changed}
    return found


def change(parameters: Iterable[torch.Tensor], share: float) -> int:
    """Have that share of the elements, anywhere, have other last bits, as a step does it. Returns how many."""
    count = 0
    for parameter in parameters:
        flat = bits(parameter)
        for part in torch.split(
            flat, 1 << 26
        ):  # of random numbers for all of an embedding there would be gigabytes
            where = (torch.rand(part.shape, device=part.device) < share).nonzero().view(-1)
            part[where] ^= torch.randint(1, 4, where.shape, device=part.device).to(part.dtype)
            count += len(where)
    return count


def passes(policy: Any, weights: PolicyWeights) -> dict[str, Any]:
    """Milliseconds of the trainer's pass and of the engine's alone, at 1 %, and of as much reading as the first has.

    Both on this GPU. The engine must be given everything afterwards: `weights` is of no more use.
    """
    session: Any = weights._session
    mirror: SparseMirror = session.transport._outgoing
    device, nbytes = mirror._device, sum(window.nbytes for window in mirror._windows)
    rooms = [tiling.room(tiling.units // 50) for tiling in mirror._tilings]
    told = torch.tensor(rooms).to(device)
    messages = [
        torch.zeros(tiling.words(room), dtype=torch.int32, device=device)
        for tiling, room in zip(mirror._tilings, rooms, strict=True)
    ]
    sums = torch.zeros(len(mirror._manifest), dtype=torch.int64, device=device)
    live = [Arena.create("engine", arena.size, device) for arena in mirror._base]
    patches = [patch(tiling, live) for tiling in mirror._tilings]

    def look() -> None:
        for k, (find, message) in enumerate(zip(mirror._finds, messages, strict=True)):
            find(told[k:], sums, message)

    def place() -> None:
        for k, (placing, message) in enumerate(zip(patches, messages, strict=True)):
            placing(told[k:], sums, message, write=True)

    def prepared() -> None:
        change(policy.parameters(), 0.01)
        for message in messages:
            message[:HEADER].zero_()

    # As many bytes read and as many written as there are of the policy: as much as is read of policy and base.
    half = torch.empty(min(nbytes, 2 << 30), dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    with torch.cuda.device(device):  # whose clock is asked
        found = {"find": timed(look, prepared), "patch": timed(place, lambda: None)}
        copied = timed(lambda: other.copy_(half), lambda: None)["p50"]
    return found | {"reading_p50": copied * nbytes / half.nbytes}


def timed(call: Callable[[], Any], before: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of `call` on the device."""
    took = []
    for _ in range(WARM_UPS + ROUNDS):
        before()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return percentiles(took[WARM_UPS:])
