"""The trainer's end of each transport, over real memory."""

from __future__ import annotations

import gc
import os
import socket
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from weight_transfer import descriptors
from weight_transfer.arena import Arena
from weight_transfer.digest import combine, digest_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.placement import Block, Placement
from weight_transfer.transports import Chunk, Handshake, SourceTensor, open_transport
from weight_transfer.transports.shared import SharedTransport
from weight_transfer.transports.stream import StreamTransport

SHAPES = {"a.bias": (6,), "b.weight": (4, 6), "q.weight": (8, 6), "v.weight": (2, 6)}
ORDER = ["v.weight", "b.weight", "q.weight", "a.bias"]  # the manifest's, which is nobody else's


def sources(dtype: torch.dtype = torch.bfloat16) -> tuple[list[SourceTensor], dict[str, nn.Parameter]]:
    torch.manual_seed(1)
    parameters = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    return [source_of(name, parameter) for name, parameter in parameters.items()], parameters


def source_of(name: str, parameter: nn.Parameter, fresh: bool = False) -> SourceTensor:
    spec = TensorSpec(name, str(parameter.dtype).removeprefix("torch."), tuple(parameter.shape))
    if fresh:
        return SourceTensor(spec, lambda: parameter.detach().clone())
    return SourceTensor(spec, lambda: parameter.detach(), parameter)


MANIFEST = Manifest(tuple(TensorSpec(name, "bfloat16", SHAPES[name]) for name in ORDER))


def placements(fragmented: Sequence[str] = ()) -> tuple[list[Placement], int]:
    """Each tensor in one block, 256 bytes apart; those in `fragmented` in two, in swapped order."""
    made, offset = [], 0
    for name in SHAPES:
        spec = MANIFEST.tensors[MANIFEST.positions[name]]
        strides = (6, 1) if len(spec.shape) == 2 else (1,)
        if name in fragmented:
            half, first = spec.shape[0] // 2, spec.nbytes // 2
            shape = (half, *spec.shape[1:])
            blocks = (
                Block(0, offset + first, strides, 0, strides, shape),
                Block(0, offset, strides, spec.numel // 2, strides, shape),
            )
        else:
            blocks = (Block(0, offset, strides, 0, strides, spec.shape),)
        made.append(Placement(spec, blocks))
        offset += 256
    return made, offset


def shared(fragmented: Sequence[str] = ()) -> tuple[SharedTransport, list[Placement], Arena]:
    made, size = placements(fragmented)
    arena = Arena.create("test", size)
    return SharedTransport(MANIFEST, made, [arena]), made, arena


def no_chunk(chunk: Chunk) -> None:
    raise AssertionError("shared sends no chunks")


def digest_of(values: dict[str, torch.Tensor]) -> int:
    return combine(digest_tensors([values[name].detach().to(torch.bfloat16) for name in ORDER]))


def engine_side(made: list[Placement], arena: Arena) -> dict[str, torch.Tensor]:
    """What the engine finds in its memory."""
    return {placement.spec.name: placement.gather([arena]) for placement in made}


def test_parameters_become_the_engines_memory_and_later_updates_move_nothing() -> None:
    transport, made, arena = shared()
    policy, parameters = sources()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    assert not transport.settled(policy)
    moved = transport.move(policy, no_chunk)
    assert moved.nbytes == MANIFEST.nbytes
    assert moved.digest == digest_of(values) == digest_of(engine_side(made, arena))
    for name, parameter in parameters.items():
        assert arena.address <= parameter.data_ptr() < arena.address + arena.size, name
        assert torch.equal(parameter, values[name])
    with torch.no_grad():
        parameters["q.weight"].mul_(2)
    assert torch.equal(engine_side(made, arena)["q.weight"], values["q.weight"] * 2)
    assert transport.settled(policy)
    again = transport.move(policy, no_chunk)
    assert (again.nbytes, again.digest, transport.touched) == (0, None, False)
    assert transport.move(policy, no_chunk, digest=True).digest == digest_of(parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_cast_into_place(dtype: torch.dtype) -> None:
    transport, made, arena = shared(fragmented=["q.weight"])
    policy, parameters = sources(dtype)
    moved = transport.move(policy, no_chunk)
    assert not transport.aliased
    for name, value in engine_side(made, arena).items():
        assert torch.equal(value, parameters[name].to(torch.bfloat16)), name
    assert moved.digest == digest_of(engine_side(made, arena))
    assert transport.move(policy, no_chunk).nbytes == MANIFEST.nbytes


def test_what_lies_in_pieces_or_is_fresh_is_written_and_the_rest_aliased() -> None:
    transport, made, arena = shared(fragmented=["q.weight"])
    policy, parameters = sources()
    policy = [
        s if s.name != "v.weight" else source_of(s.name, parameters[s.name], fresh=True) for s in policy
    ]
    transport.move(policy, no_chunk)
    assert {id(parameters[name]) for name in ("a.bias", "b.weight")} == set(transport.aliased)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    moved = transport.move(policy, no_chunk)
    assert moved.nbytes == 2 * (8 * 6 + 2 * 6)
    assert moved.digest == digest_of(parameters) == digest_of(engine_side(made, arena))


def test_a_parameter_that_was_given_other_memory_is_moved_back() -> None:
    transport, made, arena = shared()
    policy, parameters = sources()
    transport.move(policy, no_chunk)
    parameters["b.weight"].data = torch.full(
        (4, 6), 7, dtype=torch.bfloat16
    )  # as load_state_dict(assign=True)
    assert not transport.settled(policy)
    moved = transport.move(policy, no_chunk)
    assert moved.nbytes == 48
    assert moved.digest == digest_of(engine_side(made, arena)) == digest_of(parameters)
    assert transport.settled(policy)


@pytest.mark.parametrize("how", ["first row", "transposed"])
def test_a_parameter_that_reads_the_engines_memory_otherwise_is_moved(how: str) -> None:
    """It begins where it did, and has other values."""
    transport, made, arena = shared()
    policy, parameters = sources()
    transport.move(policy, no_chunk)
    name, data = "b.weight", parameters["b.weight"].data
    parameters[name].data = data[:1].expand(4, 6) if how == "first row" else data.view(6, 4).t()
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert not transport.stands()
    assert not transport.settled(policy)
    moved = transport.move(policy, no_chunk)
    assert moved.nbytes == parameters[name].numel() * 2
    assert moved.digest == digest_of(values)
    for held, value in engine_side(made, arena).items():
        assert torch.equal(value, values[held])
    assert transport.settled(policy)


def pair() -> tuple[SharedTransport, list[Placement], Arena, list[nn.Parameter]]:
    """Two parameters of one shape, which are the engine's memory."""
    specs = [TensorSpec(name, "bfloat16", (4, 6)) for name in ("a", "b")]
    made = [Placement(s, (Block(0, 256 * i, (6, 1), 0, (6, 1), (4, 6)),)) for i, s in enumerate(specs)]
    arena = Arena.create("test", 512)
    transport = SharedTransport(Manifest(tuple(specs)), made, [arena])
    both = [nn.Parameter(torch.full((4, 6), value, dtype=torch.bfloat16)) for value in (1.0, 2.0)]
    transport.move(list(map(source_of, "ab", both)), no_chunk)
    return transport, made, arena, both


@pytest.mark.parametrize("how", ["names", "memory"])
def test_parameters_that_change_places_keep_their_values(how: str) -> None:
    """On a device nothing would refuse to write what is still to be read."""
    transport, made, arena, (a, b) = pair()
    if how == "names":  # as where two modules were exchanged
        policy = [source_of("a", b), source_of("b", a)]
    else:
        a.data, b.data = b.data, a.data
        policy = [source_of("a", a), source_of("b", b)]
    moved = transport.move(policy, no_chunk)
    assert [source.read()[0, 0].item() for source in policy] == [2, 1]
    assert [value[0, 0].item() for value in engine_side(made, arena).values()] == [2, 1]
    assert moved.digest == combine(digest_tensors([source.read() for source in policy]))
    assert transport.settled(policy)


def test_a_parameter_that_was_replaced_is_the_engines_no_more() -> None:
    """Whoever has it still, as an optimizer, does not write its successor; and nobody keeps it, nor its gradient."""
    transport, _, _, (old, other) = pair()
    new = nn.Parameter(torch.full((4, 6), 9.0, dtype=torch.bfloat16))
    transport.move([source_of("a", new), source_of("b", other)], no_chunk)
    assert set(transport.aliased) == {id(new), id(other)}
    assert old.eq(1).all(), "it has its value"
    old.data.fill_(5)
    assert new.eq(9).all()
    transport.mark()
    assert not transport.disturbed()
    gone = weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None


def test_after_close_the_parameters_have_their_own_memory_and_values() -> None:
    transport, made, arena = shared()
    policy, parameters = sources()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    transport.move(policy, no_chunk)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    view = parameters["a.bias"].detach()
    transport.close()
    transport.close()
    engine_side(made, arena)["a.bias"].fill_(9)
    assert torch.equal(view, torch.full((6,), 9, dtype=torch.bfloat16))
    del arena
    gc.collect()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, values[name]), name
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # of the same parameters still
    assert torch.equal(parameters["a.bias"], values["a.bias"] - 1)


def test_a_failure_before_the_first_write_leaves_the_engine_untouched() -> None:
    transport, _, arena = shared()
    policy, parameters = sources()

    def broken() -> torch.Tensor:
        raise RuntimeError("no value")

    policy[0] = SourceTensor(policy[0].spec, broken, parameters[policy[0].name])
    with pytest.raises(RuntimeError, match="no value"):
        transport.move(policy, no_chunk)
    assert not transport.touched
    assert not arena.tensor(0, (arena.size,), torch.uint8).any()


def test_shared_fetches_descriptors_and_its_connection_is_the_session(tmp_path) -> None:
    made, size = placements()
    engine_arena = Arena.create("engine", size)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    ended = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        assert connection.recv(100) == b"t" * descriptors.TOKEN_BYTES
        descriptors.send(connection, [engine_arena.fd])
        connection.recv(1)
        connection.close()
        ended.set()

    thread = threading.Thread(target=serve)
    thread.start()
    before = len(os.listdir("/proc/self/fd"))
    handshake = Handshake(
        "shared",
        MANIFEST,
        descriptor_socket=str(tmp_path / "s"),
        token=b"t" * descriptors.TOKEN_BYTES,
        arena_sizes=(size,),
        arena_gpus=("",),
        placements=tuple(made),
    )
    transport = open_transport(handshake, timeout_s=5)
    policy, parameters = sources()
    transport.move(policy, no_chunk)
    assert digest_of(engine_side(made, engine_arena)) == digest_of(parameters)
    assert not ended.is_set()
    transport.close()
    assert ended.wait(5)
    thread.join()
    listener.close()
    del transport
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_placements_outside_the_arena_are_refused_before_anything_is_mapped() -> None:
    made, size = placements()
    handshake = Handshake(
        "shared",
        MANIFEST,
        descriptor_socket="/nowhere",
        arena_sizes=(size // 2,),
        arena_gpus=("",),
        placements=tuple(made),
    )
    with pytest.raises(ValueError, match="leave the arena"):
        open_transport(handshake)
    with pytest.raises(ValueError, match="no transport is named 'pigeon'"):
        open_transport(Handshake("pigeon", MANIFEST))


@pytest.mark.parametrize("transport", ["shared", "stream"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_digesting_writes_nothing(transport: str, dtype: torch.dtype) -> None:
    way, _, arena = shared(fragmented=["q.weight"])
    policy, parameters = sources(dtype)
    way.move(policy, no_chunk)
    memory = arena.tensor(0, (arena.size,), torch.uint8).clone()
    for parameter in parameters.values():
        parameter.data = parameter.data + 1
    read = way if transport == "shared" else StreamTransport(MANIFEST, 7)
    assert read.digest(policy) == digest_of(parameters)
    assert torch.equal(arena.tensor(0, (arena.size,), torch.uint8), memory)


def in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1)


def by_data(parameter: nn.Parameter) -> None:
    parameter.data.copy_(torch.full_like(parameter, 3))  # as of a master that the optimizer has


def fused(parameter: nn.Parameter) -> None:
    master = nn.Parameter(parameter.data)
    master.grad = torch.ones_like(master)
    torch.optim.SGD([master], lr=1.0, fused=True).step()


@pytest.mark.parametrize("write", [in_place, by_data, fused])
def test_whoever_writes_aliased_memory_is_noticed(write: Callable[[nn.Parameter], None]) -> None:
    transport, _, _ = shared()
    policy, parameters = sources()
    transport.move(policy, no_chunk)
    transport.mark()
    assert not transport.disturbed()
    write(parameters["b.weight"])
    assert transport.disturbed()
    transport.mark()
    assert not transport.disturbed()


@pytest.mark.parametrize("limit", [7, 48, 1 << 20])
def test_stream_cuts_chunks_in_the_engines_dtype(limit: int) -> None:
    policy, parameters = sources(torch.float32)
    chunks: list[Chunk] = []
    moved = StreamTransport(MANIFEST, limit).move(policy, chunks.append)
    received = [bytearray() for _ in MANIFEST]
    for chunk in chunks:
        assert 0 < len(chunk.data) <= limit
        assert chunk.offset == len(received[chunk.tensor]), "in order, without gaps"
        received[chunk.tensor] += chunk.data
    assert moved.nbytes == sum(map(len, received)) == MANIFEST.nbytes
    for spec, raw in zip(MANIFEST, received, strict=True):
        value = torch.frombuffer(raw, dtype=torch.bfloat16).view(spec.shape)
        assert torch.equal(value, parameters[spec.name].to(torch.bfloat16)), spec.name
    assert moved.digest == digest_of(parameters)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_fresh_tensors_are_held_one_at_a_time(transport: str) -> None:
    alive: list[weakref.ref] = []

    def fresh(spec: TensorSpec) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None], "the tensor before is still held"
        memory = np.zeros(spec.shape, dtype=np.float32)  # lives as long as the last tensor over it
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    policy = [
        SourceTensor(TensorSpec(spec.name, "float32", spec.shape), lambda spec=spec: fresh(spec))
        for spec in MANIFEST
    ]
    way = shared()[0] if transport == "shared" else StreamTransport(MANIFEST, 100)
    way.move(policy, lambda chunk: None)
    assert len(alive) == len(MANIFEST)


def test_stream_needs_room_for_a_byte() -> None:
    with pytest.raises(ValueError, match="max_chunk_bytes"):
        StreamTransport(MANIFEST, 0)


@pytest.mark.parametrize("fragmented", [(), ("b.weight",)])
def test_what_stands_is_told_from_addresses(fragmented: tuple[str, ...]) -> None:
    transport, _, _ = shared(fragmented)
    policy, parameters = sources()
    assert not transport.stands()
    for _ in range(2):
        transport.move(policy, no_chunk)
        assert transport.stands() is not bool(fragmented), "one that lies in pieces is written each time"
        assert transport.move([], no_chunk).nbytes == 0
        assert transport.stands() is not bool(fragmented)
        aliased = next(p for p in parameters.values() if id(p) in transport.aliased)
        aliased.data = aliased.data.clone()
        assert not transport.stands()
    transport.close()
    assert not transport.stands()
