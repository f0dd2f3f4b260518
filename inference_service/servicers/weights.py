"""WeightService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any, cast

from inference_service.host import Host
from inference_service.policy import Policy
from inference_service.servicers.engine import pause_mode
from inference_service.servicers.trainer import Trainer
from inference_service.session import Session
from inference_service.trained import trained_adapter
from inference_service.transports import NCCL, SHARED, STREAM
from inference_service.update import Update
from tandem.errors import (
    Aborted,
    FailedPrecondition,
    Reason,
    ResourceExhausted,
    TandemError,
    Violation,
    invalid,
)
from tandem.errors import InvalidArgument as InvalidArgumentError
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1 import weights_pb2_grpc
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Placement
from weight_transfer.sparse import Packed
from weight_transfer.tiles import LAYOUT

_TRANSPORT = {SHARED: pb.TRANSPORT_SHARED, NCCL: pb.TRANSPORT_NCCL, STREAM: pb.TRANSPORT_STREAM}
_MODE = {"in_place": pb.UPDATE_MODE_IN_PLACE, "staged": pb.UPDATE_MODE_STAGED}


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """Steers a Host's policy. A trainer is heard every `lease_timeout` seconds while its update is open."""

    def __init__(self, host: Host, lease_timeout: float, max_chunk_bytes: int, ending: asyncio.Event) -> None:
        """ending: set once the service lets no update begin any more."""
        self._host = host
        self._ending = ending
        self._lease_timeout = lease_timeout
        self._max_chunk_bytes = max_chunk_bytes

    async def GetManifest(self, request: pb.GetManifestRequest, context: Any) -> pb.GetManifestResponse:
        policy = self._host.policy
        return pb.GetManifestResponse(
            manifest=_manifest(policy.manifest), engine_id=policy.engine.info.engine_id
        )

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> pb.OpenSessionResponse:
        policy, sessions = self._host.policy, self._host.sessions
        tensors, identity = _specs(request.tensors), _identity(request.identity, "identity")
        members = [_identity(member, f"members[{i}]") for i, member in enumerate(request.members)]
        transport = _named(_TRANSPORT, request.transport, "transport")
        mode = _named(_MODE, request.mode, "mode")
        adapter = None
        if request.HasField("adapter"):
            sessions.check(tensors)
            asked = request.adapter
            digest = asked.base_digest if asked.HasField("base_digest") else None
            specs = _specs(asked.tensors, "adapter.tensors")
            adapter = await trained_adapter(policy, asked.name, specs, digest)
        how: dict[str, Any] = {"nccl": request.nccl_version, "window": request.nccl_window_bytes}
        session = sessions.open(tensors, identity, transport, adapter, mode, members=members, **how)
        response = pb.OpenSessionResponse(
            session_id=session.id,
            engine_id=policy.engine.info.engine_id,
            transport=_TRANSPORT[session.transport],
            reason=session.reason,
            weight_version=policy.version,
            max_chunk_bytes=self._max_chunk_bytes,
            mode=_MODE.get(session.mode, pb.UPDATE_MODE_UNSPECIFIED),
            partial=sessions.takes_changes(session),
        )
        response.lease_timeout.FromTimedelta(timedelta(seconds=self._lease_timeout))
        if adapter is not None:
            response.adapter.CopyFrom(_manifest(adapter.manifest))
        if session.transport == SHARED:
            response.shared.descriptor_socket = sessions.path
            response.shared.token = session.token
        elif session.transport == NCCL:
            response.nccl.window_bytes = session.window_bytes
            response.nccl.ranks = sessions.ranks
            response.nccl.changes_layout = LAYOUT if response.partial else 0
        if session.transport in (SHARED, NCCL):
            where, staged = sessions.placements(session), session.stage is not None
            layout = response.shared if session.transport == SHARED else response.nccl
            layout.arenas.extend(
                pb.Arena(size=handle.size, gpu_uuid=handle.gpu, rank=handle.rank)
                for handle in sessions.handles(session)
            )
            layout.placements.extend(
                _placement(where[t.name], t.dtype, staged=staged) for t in session.tensors
            )
        return response

    async def UpdateWeights(
        self, request_iterator: AsyncIterator[pb.UpdateWeightsRequest], context: Any
    ) -> AsyncIterator[pb.UpdateWeightsResponse]:
        trainer = Trainer(request_iterator, self._lease_timeout)
        try:
            message: pb.UpdateWeightsRequest | None = await trainer.next()
            while message is not None:
                committed = False
                async with aclosing(self._update(message.begin, trainer)) as answers:
                    async for answer in answers:
                        yield answer
                        committed = answer.HasField("committed")
                kept = committed and message.begin.keep_stream
                message = await trainer.again(self._ending) if kept else None
        finally:
            trainer.close()

    async def _update(
        self, begin: pb.BeginUpdate, trainer: Trainer
    ) -> AsyncGenerator[pb.UpdateWeightsResponse, None]:
        policy = self._host.policy
        if not begin.session_id:
            raise FailedPrecondition(
                Reason.UPDATE_ORDER, "an update starts with begin, which names a session"
            )
        session = self._host.sessions.get(begin.session_id)
        mode = pause_mode(begin.in_flight, "begin.in_flight")
        way = self._host.sessions.way(session, partial=begin.partial, nccl_id=begin.nccl_id)
        with session.watched(trainer.gone):
            beginning = policy.begin(
                begin.base_version,
                way,
                in_flight=mode,
                writer=session if session.transport == SHARED and way.in_place else None,
                new_version=begin.new_version if begin.HasField("new_version") else None,
            )
            # It may take as long as a rollout, or NCCL's joining, which a silent trainer does not come to.
            update = await trainer.heard_during(beginning, _lost)
            async with _Lease(update) as lease:
                if reason := trainer.has_gone:  # before it was told that it may write
                    # What comes by NCCL is on its way.
                    await lease.settle().abort(untouched=way.invitation is None, reason=reason)
                    raise Aborted(Reason.LEASE_LOST, reason)
                chosen = _MODE["in_place" if way.in_place else "staged"]
                yield pb.UpdateWeightsResponse(ready=pb.UpdateReady(mode=chosen))
                async for answer in self._move(policy, session, lease, trainer):
                    yield answer

    async def _move(
        self, policy: Policy, session: Session, lease: _Lease, trainer: Trainer
    ) -> AsyncIterator[pb.UpdateWeightsResponse]:
        prepared = False
        while True:
            message = await trainer.next()
            match message.WhichOneof("step"):
                case "heartbeat":
                    continue
                case "chunk":
                    self._check_size("chunk.data", message.chunk.data)
                    lease.update.chunk(message.chunk.tensor, message.chunk.offset, message.chunk.data)
                case "sparse":
                    self._check_size("sparse.data", message.sparse.data)
                    lease.update.changes(_packed(message.sparse))
                case "prepare":
                    if not message.prepare.HasField("digest"):
                        raise invalid("prepare.digest", "is required")
                    if lease.update.coming:
                        await trainer.heard_during(lease.update.arrived())
                    await lease.update.prepare(message.prepare.digest)
                    prepared = True
                    yield pb.UpdateWeightsResponse(prepared=pb.UpdatePrepared())
                case "commit":
                    digest = message.commit.digest if message.commit.HasField("digest") else None
                    if digest is None and not prepared and not (session.aliased and session.committed):
                        raise invalid("commit.digest", "required, since bytes moved")
                    if lease.update.coming:
                        await trainer.heard_during(lease.update.arrived())
                    version = await lease.settle().commit(digest)
                    session.committed = True
                    committed = pb.UpdateCommitted(weight_version=version)
                    committed.stopped.FromTimedelta(timedelta(seconds=policy.last_stopped))
                    yield pb.UpdateWeightsResponse(committed=committed)
                    return
                case "abort":
                    abort = message.abort
                    await lease.settle().abort(untouched=abort.untouched, reason=abort.reason)
                    yield pb.UpdateWeightsResponse(aborted=pb.UpdateAborted())
                    return
                case step:
                    raise FailedPrecondition(Reason.UPDATE_ORDER, f"{step or 'an empty step'} after begin")

    def _check_size(self, field: str, data: bytes) -> None:
        if len(data) > self._max_chunk_bytes:
            raise ResourceExhausted(
                Reason.MESSAGE_TOO_LARGE,
                f"{field}: {len(data)} bytes, the session's limit is {self._max_chunk_bytes}",
            )

    async def RestoreCheckpoint(
        self, request: pb.RestoreCheckpointRequest, context: Any
    ) -> pb.RestoreCheckpointResponse:
        return pb.RestoreCheckpointResponse(weight_version=await self._host.policy.restore())

    async def GetWeightVersion(
        self, request: pb.GetWeightVersionRequest, context: Any
    ) -> pb.GetWeightVersionResponse:
        policy = self._host.policy
        digest = None
        if request.include_digest and request.adapter:
            if (digest := policy.engine.loras.get(request.adapter).digest) is None:
                raise invalid("adapter", f"{request.adapter!r} is no trainer's, and has no digest")
        elif request.include_digest:
            digest = await policy.digest()
        return pb.GetWeightVersionResponse(**_version(policy), digest=digest)

    async def WatchWeightVersion(
        self, request: pb.WatchWeightVersionRequest, context: Any
    ) -> AsyncIterator[pb.WatchWeightVersionResponse]:
        policy = self._host.policy
        changed = asyncio.Event()
        policy.changed.append(changed.set)
        try:
            last = None
            while True:
                changed.clear()
                if (now := _version(policy)) != last:
                    yield pb.WatchWeightVersionResponse(**now)
                    last = now
                await changed.wait()
        finally:
            policy.changed.remove(changed.set)


class _Lease:
    """Sees to it that an update ends: one that is left unsettled is lost."""

    def __init__(self, update: Update) -> None:
        self.update = update
        self._settled = False

    def settle(self) -> Update:
        """The update, whose end the caller now sees to."""
        self._settled = True
        return self.update

    async def __aenter__(self) -> _Lease:
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._settled:
            await self.update.lose(_why(error))


async def _lost(update: Update, error: BaseException) -> None:
    await update.lose(_why(error))


def _why(error: BaseException | None) -> str:
    if isinstance(error, TandemError):
        return error.message
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "the trainer vanished"
    return f"{type(error).__name__} in the service"


def _version(policy: Policy) -> dict[str, Any]:
    return {
        "weight_version": policy.version,
        "state": pb.WeightState.Value(f"WEIGHT_STATE_{policy.state}"),
        "reason": policy.torn,
    }


def _dtype(name: str) -> pb.Dtype:
    return cast(pb.Dtype, pb.Dtype.Value(f"DTYPE_{name.upper()}"))


def _manifest(manifest: Manifest) -> pb.Manifest:
    tensors = [pb.TensorSpec(name=t.name, dtype=_dtype(t.dtype), shape=t.shape) for t in manifest]
    return pb.Manifest(tensors=tensors, digest=manifest.digest)


def _specs(tensors: Iterable[pb.TensorSpec], field: str = "tensors") -> list[TensorSpec]:
    specs, violations = [], []
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in pb.Dtype.values() or tensor.dtype == pb.DTYPE_UNSPECIFIED:
            violations.append(Violation(f"{field}[{i}].dtype", f"{tensor.name}: no dtype {tensor.dtype}"))
            continue
        dtype = pb.Dtype.Name(tensor.dtype).removeprefix("DTYPE_").lower()
        specs.append(TensorSpec(tensor.name, dtype, tuple(tensor.shape)))
    if violations:
        raise InvalidArgumentError(
            Reason.FIELD_INVALID, f"{len(violations)} tensors have no valid dtype", violations=violations
        )
    return specs


def _identity(it: pb.ProcessIdentity, field: str) -> ProcessIdentity:
    if not it.boot_id:
        raise invalid(f"{field}.boot_id", "is required")
    return ProcessIdentity(it.boot_id, it.pid_namespace, it.pid, it.start_time, tuple(it.gpu_uuids))


def _named(names: Mapping[str, int], given: int, field: str) -> str:
    """What the enum's value is called here; "" if it is not set."""
    if not given:
        return ""
    for name, value in names.items():
        if value == given:
            return name
    raise invalid(field, f"no {field} {given}")


def _packed(chunk: pb.SparseChunk) -> Packed:
    return Packed(chunk.tensor, chunk.first, chunk.count, chunk.gap_bytes, chunk.compressed, chunk.data)


def _placement(placement: Placement, trainer_dtype: str, *, staged: bool) -> pb.Placement:
    reason = "updates are staged" if staged else placement.alias_reason(trainer_dtype)
    blocks = [
        pb.Block(
            arena=b.arena,
            arena_offset=b.arena_offset,
            arena_strides=b.arena_strides,
            tensor_offset=b.tensor_offset,
            tensor_strides=b.tensor_strides,
            shape=b.shape,
        )
        for b in placement.blocks
    ]
    return pb.Placement(blocks=blocks, aliasable=not reason, reason=reason)
