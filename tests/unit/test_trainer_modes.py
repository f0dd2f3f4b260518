"""Staged and in-place updates, and those of what changed alone, from a trainer to a real weight service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tandem import rpc
from tandem.errors import FailedPrecondition, InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import raw
from tests.policies import (
    Engine,
    Policy,
    assert_same,
    engine,
    policy,
    restore,
    service,
)
from tests.weight_service import WeightService, network
from trainer_service.lease import Lease
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.sparse import bits
from weight_transfer.transports import Chunk, Piece, SourceTensor
from weight_transfer.transports.sparse import BREAK_EVEN, SparseTransport
from weight_transfer.transports.stream import StreamTransport

__all__ = ["engine", "policy", "service"]  # fixtures

MODES = [(transport, mode) for transport in ("shared", "stream") for mode in ("staged", "in_place")]


def change(model: nn.Module, seed: int) -> None:
    """Other values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def rewrite(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def seen_while_it_moves(monkeypatch: pytest.MonkeyPatch, weights: Any, look: Callable[[], Any]) -> list[Any]:
    """What `look` finds when all has moved, and nothing is committed."""
    transport, found = weights._session.transport, []
    move = transport.move

    def looking(*args: Any, **kwargs: Any) -> Any:
        moved = move(*args, **kwargs)
        found.append(look())
        return moved

    monkeypatch.setattr(transport, "move", looking)
    return found


@pytest.mark.parametrize(("transport", "mode"), MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_staged_or_in_place_as_the_trainer_asks(
    engine: Engine,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    mode: str,
    dtype: torch.dtype,
) -> None:
    model = network(dtype)
    weights = policy(model, transport, mode=mode)
    weights.sync()
    assert_same(engine, model)
    assert weights.aliased == (transport == "shared" and mode == "in_place" and dtype == torch.bfloat16)
    if weights.aliased:
        return  # nothing moves any more: test_trainer_weights has these
    before = engine.digest
    found = seen_while_it_moves(monkeypatch, weights, lambda: (engine.state, engine.paused))
    change(model, 1)
    weights.sync()
    assert found == [("STAGING", False) if mode == "staged" else ("WRITING", True)]
    assert engine.digest != before
    assert_same(engine, model)


@pytest.mark.parametrize(("transport", "mode"), MODES[:1] + MODES[2:])
def test_a_trainer_that_fails_in_the_middle(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch, transport: str, mode: str
) -> None:
    """What is staged is dropped; what is in place is torn, and the next update heals it."""
    model = network(torch.float32)
    weights = policy(model, transport, mode=mode)
    weights.sync()
    before = engine.digest
    change(model, 1)
    with monkeypatch.context() as patched:
        patched.setattr(Lease, "commit", failing)
        session_transport = weights._session.transport  # type: ignore[union-attr]
        move = session_transport.move

        def half(sources: Any, *args: Any, **kwargs: Any) -> Any:
            move(sources[:1], *args, **kwargs)
            raise ZeroDivisionError("in the middle")

        patched.setattr(session_transport, "move", half)
        with pytest.raises(ZeroDivisionError):
            weights.sync()
    if mode == "staged":
        assert (engine.state, engine.digest, engine.paused) == ("COMMITTED", before, False)
    else:
        assert engine.state == "TORN"
    weights.sync()
    assert_same(engine, model)


def failing(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing is to be committed")


def test_a_staged_trainer_that_shares_another_dtype_is_cast(engine: Engine, policy: Policy) -> None:
    model = network(torch.float64)
    weights = policy(model, "shared", mode="staged")
    weights.sync()
    assert_same(engine, model)
    assert weights.bytes_moved == sum(2 * p.numel() for p in model.parameters())


# Sparse.


def sparse(policy: Policy, model: nn.Module, **how: Any) -> Any:
    return policy(model, "stream", sparse=True, **how)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_set_of_changes_leaves_the_same_bits(
    engine: Engine, policy: Policy, mode: str, dtype: torch.dtype
) -> None:
    model = network(dtype)
    weights = sparse(policy, model, mode=mode)
    weights.sync()
    assert weights.history[-1].changed is None, "the first is whole"
    generator = torch.Generator().manual_seed(3)
    for share in (0.0, 0.02, 0.2, 1.0, 0.1):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        changed = 0
        for value in values.values():
            chosen = torch.rand(value.shape, generator=generator) < share
            before = value.to(torch.bfloat16, copy=True)
            value[chosen] = torch.randn(int(chosen.sum()), generator=generator).to(dtype)
            changed += int((bits(value.to(torch.bfloat16)) != bits(before)).sum())
        rewrite(model, values)
        weights.sync()
        assert weights.history[-1].changed == changed
        assert_same(engine, model)
    assert weights.history[1].nbytes == 0
    assert weights.history[-1].nbytes < weights.history[0].nbytes


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_bits_that_are_no_value_arrive_too(engine: Engine, policy: Policy, mode: str) -> None:
    """A NaN's payload, a signalling one, the sign of a zero: compared as values they would be no change, or always."""
    model = network()
    with torch.no_grad():
        bits(model[0].weight)[:3] = 0
    weights = sparse(policy, model, mode=mode)
    weights.sync()
    odd = torch.tensor([0x7FC1, 0x7F81, 0x8000 - 0x10000], dtype=torch.int16)
    for count in (3, 0):
        with torch.no_grad():
            bits(model[0].weight)[:3] = odd
        weights.sync()
        assert weights.history[-1].changed == count
        assert_same(engine, model)


def test_a_failed_update_is_followed_by_a_whole_one(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    weights = sparse(policy, model)
    weights.sync()
    change(model, 1)
    with monkeypatch.context() as patched:
        commit = Lease.commit
        patched.setattr(Lease, "commit", lambda lease, digest, **more: commit(lease, digest ^ 1, **more))
        with pytest.raises(Exception, match="the trainer's weights have digest"):
            weights.sync()
    change(model, 2)
    weights.sync()
    assert weights.history[-1].changed is None
    assert_same(engine, model)


def test_a_new_life_of_the_engine_gets_all(service: WeightService, engine: Engine, policy: Policy) -> None:
    model = network()
    weights = sparse(policy, model, timeout_s=60.0)
    weights.sync()
    service.kill()
    service.start()
    change(model, 1)
    weights.sync()
    assert weights.history[-1].changed is None
    assert_same(engine, model)


def test_changes_of_another_version_are_refused(engine: Engine, policy: Policy) -> None:
    model = network()
    weights = sparse(policy, model)
    weights.sync()
    restore(engine)
    change(model, 1)
    before = engine.digest
    with pytest.raises(FailedPrecondition) as raised:
        weights.sync()
    assert raised.value.reason == Reason.BASE_VERSION_MISMATCH
    assert (engine.state, engine.digest) == ("COMMITTED", before)


def test_who_writes_the_memory_itself_sends_no_changes(engine: Engine) -> None:
    tensors = {name: p.detach() for name, p in network().named_parameters()}
    with raw.Session(engine.weights, tensors, raw.SHARED).attach() as session:
        assert not session.answer.partial
        with pytest.raises(InvalidArgument) as caught:
            session.begin(partial=True)
        assert [v.field for v in caught.value.violations] == ["begin.partial"]


def test_a_mode_that_is_none_is_named(engine: Engine) -> None:
    tensors = {name: p.detach() for name, p in network().named_parameters()}
    request = pb.OpenSessionRequest(
        identity=raw.identity(), tensors=[raw.spec_of(*item) for item in tensors.items()]
    )
    request.mode = 9  # type: ignore[assignment]
    with pytest.raises(InvalidArgument) as caught, rpc.translated():
        engine.weights.OpenSession(request, timeout=5)
    assert [v.field for v in caught.value.violations] == ["mode"]


SHAPE = (1000, 1000)


@pytest.mark.parametrize(
    ("dtype", "share", "factor"),
    [("bfloat16", 0.01, 20), ("float16", 0.01, 20), ("float32", 0.01, 20), ("bfloat16", 0.001, 150)],
)
def test_one_percent_is_a_twentieth_of_the_bytes(dtype: str, share: float, factor: int) -> None:
    """As they travel: whole messages, with all that is around the bytes."""
    manifest = Manifest((TensorSpec("w", dtype, SHAPE),))
    generator = torch.Generator().manual_seed(0)
    value = (torch.randn(SHAPE, generator=generator) * 0.02).to(getattr(torch, dtype))
    chosen = torch.randperm(value.numel(), generator=generator)[: int(share * value.numel())]
    source = SourceTensor(manifest.tensors[0], lambda: value)
    transport = SparseTransport(manifest, 1 << 20)
    transport.move([source], lambda piece: None)
    transport.mark()
    bits(value)[chosen] ^= torch.randint(1, 128, chosen.shape, generator=generator).to(bits(value).dtype)
    whole: list[Piece] = []
    changes: list[Piece] = []
    assert transport.partial
    moved = transport.move([source], changes.append)
    StreamTransport(manifest, 1 << 20).move([source], whole.append)
    assert (moved.changed, moved.nbytes) == (len(chosen), sum(len(piece.data) for piece in changes))
    assert travelled(whole) >= factor * travelled(changes)


def travelled(pieces: list[Piece]) -> int:
    """Bytes of the messages."""
    messages = [
        pb.UpdateWeightsRequest(chunk=pb.TensorChunk(**vars(piece)))
        if isinstance(piece, Chunk)
        else pb.UpdateWeightsRequest(sparse=pb.SparseChunk(**vars(piece)))
        for piece in pieces
    ]
    return sum(message.ByteSize() for message in messages)


@pytest.mark.parametrize("over", [-1, 1])
def test_a_tensor_of_which_much_changed_travels_whole(over: int) -> None:
    manifest = Manifest((TensorSpec("w", "bfloat16", (1000,)),))
    value = torch.zeros(1000, dtype=torch.bfloat16)
    transport = SparseTransport(manifest, 1 << 20)
    source = SourceTensor(manifest.tensors[0], lambda: value)
    transport.move([source], lambda piece: None)
    transport.mark()
    value[: int(BREAK_EVEN * 1000) + over] = 1
    pieces: list[Piece] = []
    transport.move([source], pieces.append)
    assert isinstance(pieces[0], Chunk) == (over > 0)
