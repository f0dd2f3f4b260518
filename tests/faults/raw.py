"""A trainer that speaks the weight protocol message by message, so that a test can leave any of them out."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tandem import rpc
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from weight_transfer import descriptors
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.identity import ProcessIdentity
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement, check
from weight_transfer.scatter import scatter
from weight_transfer.sparse import Changes, bits, changed, pack

TIMEOUT_S = 20.0

Tensors = dict[str, torch.Tensor]
SHARED, STREAM = pb.TRANSPORT_SHARED, pb.TRANSPORT_STREAM
IN_PLACE, STAGED = pb.UPDATE_MODE_IN_PLACE, pb.UPDATE_MODE_STAGED


def dtype_name(value: int) -> str:
    return pb.Dtype.Name(value).removeprefix("DTYPE_").lower()


def spec_of(name: str, tensor: torch.Tensor) -> pb.TensorSpec:
    dtype = pb.Dtype.Value(f"DTYPE_{str(tensor.dtype).removeprefix('torch.').upper()}")
    return pb.TensorSpec(name=name, dtype=dtype, shape=tensor.shape)


def identity(**changes: Any) -> pb.ProcessIdentity:
    """This process's, or one that differs in `changes`."""
    mine = ProcessIdentity.current()
    fields = {
        name: getattr(mine, name) for name in ("boot_id", "pid_namespace", "pid", "start_time", "gpu_uuids")
    }
    return pb.ProcessIdentity(**(fields | changes))


class Session:
    """An open session. A shared one has the engine's memory mapped until it is closed."""

    def __init__(
        self, stub: WeightServiceStub, tensors: Tensors, transport: int = 0, mode: int = 0, **of: Any
    ) -> None:
        self.stub = stub
        with rpc.translated():
            self.manifest = manifest(stub)
            request = pb.OpenSessionRequest(
                identity=identity(**of),
                tensors=[spec_of(*item) for item in tensors.items()],
                transport=transport,
                mode=mode,
            )
            self.answer = stub.OpenSession(request, timeout=TIMEOUT_S)
        self.id = self.answer.session_id
        self.version: int = self.answer.weight_version
        self.shared = self.answer.transport == SHARED
        self.arenas: list[Arena] = []
        self.placements: dict[str, Placement] = {}
        self.connection: socket.socket | None = None
        self._names = list(tensors)

    def attach(self) -> Session:
        """Map the engine's memory."""
        shared = self.answer.shared
        specs = {spec.name: spec for spec in self.manifest}
        self.placements = {
            name: Placement(specs[name], tuple(map(_block, placement.blocks)))
            for name, placement in zip(self._names, shared.placements, strict=True)
        }
        sizes = [arena.size for arena in shared.arenas]
        check(list(self.placements.values()), sizes)
        fds, self.connection = descriptors.receive(
            shared.descriptor_socket, shared.token, len(shared.arenas), TIMEOUT_S
        )
        self.arenas = [Arena.open(fd, size) for fd, size in zip(fds, sizes, strict=True)]
        for fd in fds:
            os.close(fd)
        return self

    def view(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the engine's memory."""
        return self.placements[name].view(self.arenas)

    def write(self, tensors: Tensors) -> int:
        """Write tensors to the engine's memory. Returns the bytes written."""
        return scatter(
            [pair for n, t in tensors.items() for pair in self.placements[n].pairs(self.arenas, t)]
        )

    def digest(self, tensors: Tensors) -> int:
        """Digest of the whole policy."""
        return digest_of(self.manifest, tensors)

    def chunks(self, tensors: Tensors, size: int = 0) -> Iterator[pb.TensorChunk]:
        """The whole policy in chunks."""
        size = size or self.answer.max_chunk_bytes
        for i, spec in enumerate(self.manifest):
            value = tensors[spec.name].detach().to(getattr(torch, spec.dtype)).contiguous()
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            for start in range(0, len(raw), size):
                yield pb.TensorChunk(tensor=i, offset=start, data=raw[start : start + size])

    def sparse_chunks(self, tensors: Tensors, before: Tensors) -> Iterator[pb.SparseChunk]:
        """What differs from `before`, both in whatever dtype."""
        for i, spec in enumerate(self.manifest):
            dtype = getattr(torch, spec.dtype)
            now, old = (bits(of[spec.name].detach().to(dtype).contiguous()) for of in (tensors, before))
            where = changed(now, old)
            for packed in pack(Changes(i, where, now[where]), self.answer.max_chunk_bytes):
                yield pb.SparseChunk(**vars(packed))

    def begin(self, base: int | None = None, **fields: Any) -> Update:
        """Open an update, which is ready when this returns."""
        timeout = fields.pop("timeout", TIMEOUT_S)
        update = Update(self.stub, timeout)
        update.send(begin=self.beginning(base, **fields))
        update.expect("ready")
        return update

    def beginning(self, base: int | None = None, **fields: Any) -> pb.BeginUpdate:
        """An update's first message."""
        base = self.version if base is None else base
        return pb.BeginUpdate(session_id=self.id, base_version=base, **fields)

    def update(self, tensors: Tensors) -> int:
        """A whole update of `tensors`, whichever way they move. Returns the version."""
        with self.begin() as update:
            if self.shared:
                self.write(tensors)
            else:
                for chunk in self.chunks(tensors):
                    update.send(chunk=chunk)
            self.version = update.commit(self.digest(tensors))
        return self.version

    def close(self) -> None:
        self.arenas.clear()
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Update:
    """The stream of one update. Sends heartbeats until told to be silent."""

    def __init__(self, stub: WeightServiceStub, timeout: float = TIMEOUT_S) -> None:
        self._outbox: queue.Queue[pb.UpdateWeightsRequest | None] = queue.Queue()
        self._silent = threading.Event()
        self.call = stub.UpdateWeights(self._messages(), timeout=timeout)

    def _messages(self) -> Iterator[pb.UpdateWeightsRequest]:
        while True:
            try:
                message = self._outbox.get(timeout=0.25)
            except queue.Empty:
                if self._silent.is_set():
                    message = self._outbox.get()
                else:
                    message = pb.UpdateWeightsRequest(heartbeat=pb.Heartbeat())
            if message is None:
                return
            yield message

    def send(self, **step: Any) -> None:
        self._outbox.put(pb.UpdateWeightsRequest(**step))

    def silence(self) -> None:
        """No more heartbeats."""
        self._silent.set()

    def expect(self, step: str) -> Any:
        """The service's next answer. Raises the TandemError that ended the update instead."""
        with rpc.translated():
            answer = next(self.call)
        assert answer.WhichOneof("step") == step
        return getattr(answer, step)

    def prepare(self, digest: int | None) -> None:
        self.send(prepare=pb.PrepareUpdate(digest=digest))
        self.expect("prepared")

    def commit(self, digest: int | None = None) -> int:
        self.send(commit=pb.CommitUpdate(digest=digest))
        return int(self.expect("committed").weight_version)

    def abort(self, *, untouched: bool, reason: str = "") -> None:
        self.send(abort=pb.AbortUpdate(untouched=untouched, reason=reason))
        self.expect("aborted")

    def end(self) -> None:
        """Say that no more comes."""
        self._outbox.put(None)

    def cancel(self) -> None:
        self.call.cancel()

    def __enter__(self) -> Update:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        self.call.cancel()


def manifest(stub: WeightServiceStub) -> Manifest:
    answer = stub.GetManifest(pb.GetManifestRequest(), timeout=TIMEOUT_S)
    found = Manifest(
        tuple(TensorSpec(t.name, dtype_name(t.dtype), tuple(t.shape)) for t in answer.manifest.tensors)
    )
    assert found.digest == answer.manifest.digest
    return found


def digest_of(manifest: Manifest, tensors: Tensors) -> int:
    """Digest of a whole policy, cast to the engine's dtypes by torch itself."""
    return combine(digest_tensors([tensors[s.name].detach().to(getattr(torch, s.dtype)) for s in manifest]))


def now(stub: WeightServiceStub, *, digest: bool = False) -> pb.GetWeightVersionResponse:
    with rpc.translated():
        return stub.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=digest), timeout=TIMEOUT_S)


def state(stub: WeightServiceStub) -> str:
    """COMMITTED, STAGING, WRITING or TORN."""
    return pb.WeightState.Name(now(stub).state).removeprefix("WEIGHT_STATE_")


def restore(stub: WeightServiceStub) -> int:
    with rpc.translated():
        return int(stub.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=TIMEOUT_S).weight_version)


@contextlib.contextmanager
def watching(stub: WeightServiceStub) -> Iterator[Iterator[tuple[int, str]]]:
    """(version, state) now and at every change."""
    call = stub.WatchWeightVersion(pb.WatchWeightVersionRequest(), timeout=TIMEOUT_S)
    try:
        yield ((m.weight_version, pb.WeightState.Name(m.state).removeprefix("WEIGHT_STATE_")) for m in call)
    finally:
        call.cancel()


def wait_for(changes: Iterator[tuple[int, str]], wanted: str) -> int:
    """Wait until the state is `wanted`. The version then. The watch's deadline is the wait's."""
    for version, found in changes:
        if found == wanted:
            return version
    raise AssertionError(f"the watch ended before {wanted}")


def wait_for_either(changes: Iterator[tuple[int, str]], *wanted: str) -> str:
    """Wait until the state is one of these. Which."""
    for _, found in changes:
        if found in wanted:
            return found
    raise AssertionError(f"the watch ended before any of {wanted}")


def _block(block: pb.Block) -> Block:
    return Block(
        block.arena,
        block.arena_offset,
        tuple(block.arena_strides),
        block.tensor_offset,
        tuple(block.tensor_strides),
        tuple(block.shape),
    )


def all_equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Bit for bit, NaNs too."""
    return digest_tensors(list(a)) == digest_tensors(list(b))
