"""Adapters that trainers update: what a session's updates carry in place of the policy. Knows nothing of gRPC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import structlog

from inference_service import passing
from inference_service.loras import why_not_adapted
from inference_service.staging import Staging
from tandem.errors import FailedPrecondition, InvalidArgument, Reason, Violation, invalid
from weight_transfer.manifest import CASTABLE, Manifest, TensorSpec

if TYPE_CHECKING:
    from inference_service.policy import Policy

log = structlog.get_logger(__name__)

PARTS = (".lora_A.weight", ".lora_B.weight")
_MAX_NAME = 256


class TrainedAdapter:
    """One session's adapter, and how it gets into the workers' memory.

    It sits on the weights that the engine had when the session was opened, and on no others: `writes` is how often they
    had been written then.
    """

    def __init__(self, policy: Policy, name: str, manifest: Manifest, writes: int) -> None:
        self.name = name
        self.manifest = manifest
        self.writes = writes
        self._policy = policy
        self._engine = policy.engine

    def check(self) -> None:
        """Refuse an update where the engine's weights are not those that the adapter is for.

        Raises:
            FailedPrecondition: BASE_VERSION_MISMATCH. Unavailable: ENGINE_TORN.
        """
        if self._policy.torn:
            raise self._policy.torn_error()
        if self.writes != self._policy.writes:
            raise FailedPrecondition(
                Reason.BASE_VERSION_MISMATCH,
                "the weights under the adapter were written since its session was opened; open another",
                metadata={"weight_version": str(self._policy.version)},
            )

    async def prepare(self, staging: Staging) -> None:
        """Have every worker take what was staged, and change nothing yet: generation goes on."""
        request = self._engine.loras.trained(self.name).request
        specs = [(spec.name, spec.dtype, list(spec.shape)) for spec in self.manifest]
        async with passing.offered([staging.arena.fd]) as path:
            await self._engine.call_workers(
                "tandem_adapter_prepare", request.lora_int_id, path, staging.arena.size, specs
            )

    async def swap(self, digest: int) -> None:
        """Have every worker compute with what it took, which has this digest. Generation stands still."""
        loras = self._engine.loras
        adapter = loras.trained(self.name)
        request = adapter.request
        await self._engine.call_workers(
            "tandem_adapter_swap", self.name, request.lora_int_id, request.lora_path
        )
        adapter.digest = digest
        loras.put(self.name, adapter)

    async def revert(self) -> bool:
        """Have all workers compute with what they had before `swap`, which failed in one of them.

        Returns:
            Whether they do. Else nobody can ask for the adapter any more.
        """
        try:
            await self._engine.call_workers("tandem_adapter_revert")
        except Exception:
            log.exception("an adapter's exchange could not be undone", adapter=self.name)
            self._engine.loras.drop(self.name)
            return False
        return True


async def trained_adapter(
    policy: Policy, name: str, tensors: Sequence[TensorSpec], base_digest: int | None
) -> TrainedAdapter:
    """What a trainer's session updates. Nothing changes yet.

    Args:
        policy: of the engine that shall have it.
        name: what rollouts call it.
        tensors: as the trainer has them, in any order.
        base_digest: of the weights that it was made for.

    Raises:
        FailedPrecondition: LORA_OFF.
        InvalidArgument: a field is missing; or MANIFEST_MISMATCH, naming each tensor that the engine cannot use, or the
            base.
        Unavailable: ENGINE_TORN. Aborted: LEASE_HELD, the engine's weights are being written.
    """
    engine = policy.engine
    dtype, max_rank = engine.loras.limits()
    if not 0 < len(name) <= _MAX_NAME:
        raise invalid("adapter.name", f"must have 1 to {_MAX_NAME} characters, has {len(name)}")
    if not tensors:
        raise invalid("adapter.tensors", "at least one module's are required")
    if base_digest is None:
        raise invalid("adapter.base_digest", "is required")
    shapes = {spec.name: spec.shape for spec in policy.manifest}
    problems = list(_problems(tensors, shapes, max_rank))
    if not problems:
        modules = sorted({_split(spec.name)[0] for spec in tensors})
        answers = await engine.call_workers("tandem_adapter_missing", modules)
        for module in sorted({module for answer in answers for module in answer}):
            problems.append((module + PARTS[0], "the engine has no place for an adapter there"))
    if problems:
        first = problems[0]
        raise InvalidArgument(
            Reason.MANIFEST_MISMATCH,
            f"{len({name for name, _ in problems})} tensors of the adapter are none that the engine can use, first "
            f"{first[0]}: {first[1]}",
            violations=[Violation(f"adapter.tensors[{name}]", why) for name, why in problems],
        )
    if policy.torn:
        raise policy.torn_error()
    if (found := await policy.digest()) != base_digest:
        why = f"the weights under the adapter have digest {base_digest:016x}, the engine's {found:016x}"
        raise InvalidArgument(
            Reason.MANIFEST_MISMATCH,
            f"the adapter was not made for the engine's weights: {why}",
            violations=[Violation("adapter.base_digest", why)],
            metadata={"trainer": f"{base_digest:016x}", "engine": f"{found:016x}"},
        )
    specs = sorted((TensorSpec(spec.name, dtype, spec.shape) for spec in tensors), key=lambda spec: spec.name)
    return TrainedAdapter(policy, name, Manifest(tuple(specs)), policy.writes)


def _split(name: str) -> tuple[str, str]:
    """The module that a tensor adapts and which part it is, "" if none."""
    for part in PARTS:
        if name.endswith(part):
            return name.removesuffix(part), part
    return name, ""


def _problems(
    tensors: Sequence[TensorSpec], policy: dict[str, tuple[int, ...]], max_rank: int
) -> Iterator[tuple[str, str]]:
    """Name and fault of each tensor that cannot be used with the policy's shapes."""
    given = {spec.name: spec for spec in tensors}
    for name, count in Counter(spec.name for spec in tensors).items():
        if count > 1:
            yield name, f"given {count} times"
    for name, spec in given.items():
        module, part = _split(name)
        if not part:
            yield name, f"an adapter's tensors are {PARTS[0][1:]} and {PARTS[1][1:]} of a module"
            continue
        other = given.get(module + PARTS[part == PARTS[0]])
        if spec.dtype not in CASTABLE:
            yield name, f"dtype {spec.dtype} cannot become the engine's"
        if len(spec.shape) != 2:
            yield name, f"has shape {list(spec.shape)}, where two dimensions are needed"
        elif why := why_not_adapted(module, name, spec.shape, policy, part.removeprefix(".lora_")):
            yield name, why
        elif other is None:
            yield name, f"{module}{PARTS[part == PARTS[0]]} is missing"
        elif part == PARTS[0] and (rank := spec.shape[0]) not in other.shape[1:]:
            yield name, f"has rank {rank}, but {other.name} has shape {list(other.shape)}"
        elif part == PARTS[0] and not 0 < rank <= max_rank:
            yield name, f"has rank {rank}; the engine's max_lora_rank is {max_rank}"
