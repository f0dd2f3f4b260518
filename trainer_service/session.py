"""A trainer's session with the weight service: the handshake, and the leases that it may take."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import torch

from tandem import rpc
from tandem.errors import Aborted, FailedPrecondition, Internal, InvalidArgument, Reason, Violation
from tandem.weights.v1 import weights_pb2 as pb
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.line import Line
from trainer_service.pulse import ask, watched
from weight_transfer.cuda import nccl
from weight_transfer.cuda.devices import uuid_of
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import Manifest, TensorSpec, mismatches
from weight_transfer.placement import Block, Placement
from weight_transfer.tiles import LAYOUT
from weight_transfer.transports import Handshake, SourceTensor, open_transport
from weight_transfer.transports.outgoing import window_wanted

if TYPE_CHECKING:
    from trainer_service.together import Together

logger = logging.getLogger(__name__)

UPDATE_TIMEOUT_S = 1800.0
ANSWER_TIMEOUT_S = 120.0

PolicyOf = Callable[[Sequence[str]], list[SourceTensor]]
#: Calls a method of a service with a request and a deadline in seconds. Raises TandemErrors.
Calling = Callable[[Any, Any, float], Any]


def first_of(transports: Sequence[str | None], opened: Callable[[str | None], Session]) -> Session:
    """With the first of these transports that can be had. Raises what stands in the way of the last."""
    *others, last = transports
    for transport in others:
        try:
            return opened(transport)
        except FailedPrecondition as error:
            if error.reason != Reason.TRANSPORT_UNAVAILABLE:
                raise
    return opened(last)


class Session:
    """The policy of one trainer, accepted by one life of the engine."""

    _adapter = ""

    def __init__(
        self,
        client: InferenceClient,
        policy_of: PolicyOf,
        *,
        transport: str | None,
        timeout_s: float,
        mode: str = "",
        sparse: bool = False,
        together: Together | None = None,
        window_bytes: int = 0,
        calling: Calling | None = None,
    ) -> None:
        """Introduce the policy, and open the transport that is chosen.

        Args:
            client: the service.
            policy_of: gives the policy's tensors, for the names that the engine's manifest has.
            transport: shared, nccl or stream, or None to let the service choose.
            timeout_s: deadline in seconds of each step.
            mode: staged or in_place, or "" to let the service choose.
            sparse: whether updates by stream or NCCL shall carry what changed alone, where the service takes that.
            together: the ranks of the run, which write the engine's memory where that is of several workers.
            window_bytes: of what goes by NCCL, or 0 for as many as suit the policy.
            calling: how calls are waited for; until their deadline, if None.

        Raises:
            InvalidArgument: the policy is not the engine's model; each tensor at fault is named.
            FailedPrecondition: the transport cannot be had, with the reason.
            Aborted: another trainer has the engine.
        """
        self._client = client
        self._line: Line | None = None
        self._calling = calling or _called
        answer = self._calling(client.weights.GetManifest, pb.GetManifestRequest(), timeout_s)
        manifest = manifest_of(answer.manifest)
        self.names = [tensor.name for tensor in manifest]
        policy = policy_of(self.names)
        request = self._request(manifest, policy)
        request.transport = _transport_value(transport)
        request.mode = _mode_value(mode)
        if together is not None:
            request.members.extend(together.identities[1:])
        request.nccl_window_bytes = window_bytes or window_wanted(manifest, policy)
        opened = self._calling(client.weights.OpenSession, request, timeout_s)
        self.id = opened.session_id
        self.max_chunk_bytes: int = opened.max_chunk_bytes
        self.takes_changes: bool = opened.partial
        self.engine_id = opened.engine_id
        self.weight_version: int = opened.weight_version
        self.lease_timeout_s = opened.lease_timeout.ToNanoseconds() / 1e9
        chosen = pb.Transport.Name(opened.transport).removeprefix("TRANSPORT_").lower()
        try:
            self.carried = self._carried(manifest, opened)
            if together is not None and len({arena.rank for arena in opened.shared.arenas}) > 1:
                self.transport = together.join(request, answer.manifest, opened)
            else:
                together = None
                names = [source.name for source in policy]
                handshake = handshake_of(
                    chosen, opened, self.carried, names, sparse=sparse, device=_device(policy)
                )
                self.transport = open_transport(handshake, timeout_s)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            message = f"The {chosen} transport could not be opened: {error}"
            raise FailedPrecondition(Reason.TRANSPORT_UNAVAILABLE, message) from error
        logger.info("weights move by the %s transport%s", chosen, opened.reason and f": {opened.reason}")
        #: Of a shared transport, why each tensor does not become the engine's memory; "" of those that do.
        self.alias_reasons = _alias_reasons(policy, opened) if chosen == "shared" else {}
        if together is not None:
            several = "several ranks of the trainer write it"
            self.alias_reasons = {name: reason or several for name, reason in self.alias_reasons.items()}
        if self.alias_reasons:
            logger.info("%s", told(self.alias_reasons))

    def _request(self, manifest: Manifest, policy: list[SourceTensor]) -> pb.OpenSessionRequest:
        """What introduces the policy to an engine of that manifest."""
        return pb.OpenSessionRequest(
            identity=_identity(policy),
            tensors=specs_of(policy),
            nccl_version=nccl.version() if has_nccl(policy) else 0,
        )

    def _carried(self, manifest: Manifest, opened: pb.OpenSessionResponse) -> Manifest:
        """What updates carry."""
        return manifest

    def begin(
        self,
        number: int,
        *,
        timeout_s: float = UPDATE_TIMEOUT_S,
        ready_timeout_s: float = ANSWER_TIMEOUT_S,
        partial: bool | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        stands: Callable[[], bool] | None = None,
        begun: Callable[[Lease], None] = lambda lease: None,
        watched: bool = False,
    ) -> Lease:
        """Take the lease for the update that makes version `number` on top of `weight_version`.

        `meanwhile` is called while the engine stops. `partial` is what the session's transport says, if None. `stands`,
        which is called then too, tells whether what will be moved is what the transport has as it `stands`, and may
        therefore go ahead. `begun` is given the lease first of all, so that others can cut it. `watched` says that they
        do where the service stands still.

        Raises:
            FailedPrecondition: somebody else made a newer version.
            Aborted: another trainer holds the lease.
            TransportError: the engine's side of the transport did not come.
        """
        transport = self.transport

        def joined(lease: Lease) -> None:
            begun(lease)
            transport.join(lease.check)
            ahead = False
            with suppress(Exception):  # whoever looks at the policy then says what is wrong with it
                ahead = stands is not None and stands()
            if ahead:
                transport.ahead()
            meanwhile()

        while True:
            kept, line = self._line, self._line_for(timeout_s)
            begin = pb.BeginUpdate(
                session_id=self.id,
                base_version=self.weight_version,
                new_version=number,
                partial=transport.partial if partial is None else partial,
                nccl_id=transport.invitation(),
                keep_stream=True,
            )
            try:
                return Lease(
                    line,
                    begin,
                    heartbeat_s=max(self.lease_timeout_s / 4, 0.05),
                    timeout_s=timeout_s,
                    ready_timeout_s=ready_timeout_s,
                    answer_timeout_s=ANSWER_TIMEOUT_S,
                    meanwhile=joined,
                    ask=None if watched else functools.partial(ask, self._client),
                )
            except BaseException:
                transport.withdraw()
                if line is not kept or not line.stale:
                    raise  # else anew, in a stream of its own: a service may end one that it was to keep

    def check(self, policy: Sequence[SourceTensor]) -> None:
        """See that it still has the tensors that were introduced: no update may leave one as it was, unseen.

        Raises:
            InvalidArgument: MANIFEST_MISMATCH, naming every tensor that is not among them, or not as it was.
        """
        if found := mismatches(self.carried, [source.spec for source in policy]):
            raise InvalidArgument(
                Reason.MANIFEST_MISMATCH,
                f"{len({m.name for m in found})} tensors of the policy are not any more what was introduced to the "
                f"engine, first {found[0].name}: {found[0].problem}",
                violations=[Violation(f"tensors[{m.name}]", m.problem) for m in found],
            )

    def _line_for(self, seconds: float) -> Line:
        """The last update's, if it is still there for as long; else another."""
        if self._line is None or not self._line.lasts(seconds):
            self._end_line()
            self._line = Line(self._client.weights, 2 * seconds)
        return self._line

    def _end_line(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def close(self) -> None:
        """End it. Parameters that were the engine's memory get memory of their own, with the same values."""
        self._end_line()
        self.transport.close()

    def holds(self, number: int, digest: int) -> bool:
        """Whether the engine has committed weights of this digest as version `number`.

        Raises:
            Aborted: LEASE_HELD, an update has the weights, and is perhaps the one that makes them these.
        """
        request = pb.GetWeightVersionRequest(include_digest=True, adapter=self._adapter)
        now = watched(self._client, self._client.weights.GetWeightVersion, request, ANSWER_TIMEOUT_S)
        if now.state == pb.WEIGHT_STATE_WRITING:  # an adapter has a digest also then
            raise Aborted(Reason.LEASE_HELD, "the weights are being written")
        # What is staged is beside it: the next update's, or this one's while its memory is given back.
        committed: bool = now.state in (pb.WEIGHT_STATE_COMMITTED, pb.WEIGHT_STATE_STAGING)
        return committed and (now.weight_version, now.digest) == (number, digest)


def _called(method: Any, request: Any, timeout_s: float) -> Any:
    with rpc.translated():
        return method(request, timeout=timeout_s)


def has_nccl(policy: Sequence[SourceTensor]) -> bool:
    """Whether the policy may go by NCCL, as far as this side knows."""
    return bool(_device(policy) and nccl.version())


def _identity(policy: Sequence[SourceTensor]) -> pb.ProcessIdentity:
    return identity_of({source.device for source in policy})


def identity_of(devices: Iterable[str]) -> pb.ProcessIdentity:
    """Where this process lives, with the GPUs among these devices."""
    devices = sorted(device for device in devices if device.startswith("cuda"))
    mine = ProcessIdentity.current(tuple(uuid_of(torch.device(device)) for device in devices))
    return pb.ProcessIdentity(
        boot_id=mine.boot_id,
        pid_namespace=mine.pid_namespace,
        pid=mine.pid,
        start_time=mine.start_time,
        gpu_uuids=mine.gpu_uuids,
    )


def _device(policy: Sequence[SourceTensor]) -> str:
    """The GPU that holds the policy; "" if none does, or several do."""
    devices = {source.device for source in policy}
    return devices.pop() if len(devices) == 1 and min(devices).startswith("cuda") else ""


def specs_of(policy: Sequence[SourceTensor]) -> list[pb.TensorSpec]:
    """The tensors, as messages."""
    return [pb.TensorSpec(name=s.name, dtype=_dtype_value(s.spec.dtype), shape=s.spec.shape) for s in policy]


def _dtype_value(name: str) -> pb.Dtype:
    # Of a dtype that the contract has no name for, the service says which tensor has it.
    number = dict(pb.Dtype.items()).get(f"DTYPE_{name.upper()}", pb.DTYPE_UNSPECIFIED)
    return cast(pb.Dtype, number)


def _transport_value(name: str | None) -> pb.Transport:
    return cast(pb.Transport, 0 if name is None else pb.Transport.Value(f"TRANSPORT_{name.upper()}"))


def _mode_value(name: str) -> pb.UpdateMode:
    return cast(pb.UpdateMode, pb.UpdateMode.Value(f"UPDATE_MODE_{name.upper()}") if name else 0)


def manifest_of(message: pb.Manifest) -> Manifest:
    """The message as ours, checked against its digest."""
    manifest = Manifest(
        tuple(
            TensorSpec(t.name, pb.Dtype.Name(t.dtype).removeprefix("DTYPE_").lower(), tuple(t.shape))
            for t in message.tensors
        )
    )
    if message.digest != manifest.digest:
        raise Internal(Reason.BUG, "The manifest's digest is not that of its tensors.")
    return manifest


def handshake_of(
    chosen: str,
    opened: pb.OpenSessionResponse,
    manifest: Manifest,
    names: Sequence[str],
    *,
    sparse: bool = False,
    device: str = "",
) -> Handshake:
    """What opens the transport that the service chose.

    Args:
        names: of the tensors that the trainer asked with, in that order.
        sparse: whether updates shall carry what changed alone, where the service takes that.
        device: the GPU that holds the policy.
    """
    shared = opened.nccl if chosen == "nccl" else opened.shared
    if chosen in ("shared", "nccl") and len(shared.placements) != len(names):
        raise Internal(Reason.BUG, "The service placed another number of tensors than it was given.")
    return Handshake(
        transport=chosen,
        manifest=manifest,
        max_chunk_bytes=opened.max_chunk_bytes,
        descriptor_socket=opened.shared.descriptor_socket,
        token=opened.shared.token,
        arena_sizes=tuple(arena.size for arena in shared.arenas),
        arena_gpus=tuple(arena.gpu_uuid for arena in shared.arenas),
        placements=tuple(
            Placement(manifest.tensors[manifest.positions[name]], tuple(map(_block, p.blocks)))
            for name, p in zip(names, shared.placements, strict=False)
        ),
        staged=opened.mode == pb.UPDATE_MODE_STAGED,
        partial=sparse and opened.partial and (chosen != "nccl" or opened.nccl.changes_layout == LAYOUT),
        window_bytes=opened.nccl.window_bytes,
        ranks=opened.nccl.ranks,
        device=device,
    )


def _alias_reasons(policy: Sequence[SourceTensor], opened: pb.OpenSessionResponse) -> dict[str, str]:
    return {
        source.name: p.reason or ("" if source.parameter is not None else "the trainer gathers or merges it")
        for source, p in zip(policy, opened.shared.placements, strict=True)
    }


def told(reasons: Mapping[str, str]) -> str:
    """How many tensors are the engine's memory, and of each reason why others are not, how many and one of them."""
    others: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            others.setdefault(reason, []).append(name)
    whole = sum(not reason for reason in reasons.values())
    parts = [f"{reason} ({len(names)}, as {names[0]})" for reason, names in others.items()]
    return "; ".join([f"{whole} of {len(reasons)} tensors are the engine's memory", *parts])


def _block(block: pb.Block) -> Block:
    return Block(
        arena=block.arena,
        arena_offset=block.arena_offset,
        arena_strides=tuple(block.arena_strides),
        tensor_offset=block.tensor_offset,
        tensor_strides=tuple(block.tensor_strides),
        shape=tuple(block.shape),
    )
