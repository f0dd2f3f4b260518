"""Staged, in-place, sparse and prepared updates of a real engine: what it serves meanwhile, and afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.errors import DataLoss, FailedPrecondition, Reason
from tandem.inference.v1 import inference_pb2
from tandem.weights.v1 import weights_pb2 as pb
from tests.faults import oracle, raw
from tests.faults.plane import Plane
from tests.faults.raw import IN_PLACE, SHARED, STAGED, STREAM
from tests.services import Service


@pytest.fixture(scope="module")
def made(llama: Service, checkpoints: dict[str, Path]) -> Plane:
    return Plane(llama, checkpoints["llama"])


@pytest.fixture
def plane(made: Plane) -> Iterator[Plane]:
    made.start()
    yield made
    made.wait_until_alone()
    if raw.now(made.stub).weight_version != made.version or raw.state(made.stub) == "TORN":
        raw.restore(made.stub)
    made.start()


def bring(session: raw.Session, update: raw.Update, tensors: raw.Tensors, before: raw.Tensors | None) -> None:
    if session.shared:
        session.write(tensors)
    elif before is None:
        for chunk in session.chunks(tensors):
            update.send(chunk=chunk)
    else:
        for sparse in session.sparse_chunks(tensors, before):
            update.send(sparse=sparse)


WAYS = [
    (SHARED, STAGED, False),
    (STREAM, STAGED, False),
    (STREAM, IN_PLACE, False),
    (STREAM, STAGED, True),
    (STREAM, IN_PLACE, True),
]


@pytest.mark.parametrize(("transport", "mode", "sparse"), WAYS)
def test_an_update_is_served_once_it_is_committed_and_not_before(
    plane: Plane, transport: int, mode: int, sparse: bool
) -> None:
    """Staged, the engine goes on with the old version. In place, who asks is answered with the new one."""
    old = oracle.tensors_of(plane.old, plane.names)
    with plane.open(transport, mode=mode) as session:
        assert session.answer.mode == mode
        update = raw.Update(plane.stub)
        update.send(begin=pb.BeginUpdate(session_id=session.id, base_version=session.version, partial=sparse))
        with update:
            assert update.expect("ready").mode == mode
            asked: list[object] = []
            asking = threading.Thread(target=lambda: asked.append(oracle.scores(plane.service)))
            if mode == IN_PLACE:
                asking.start()
            bring(session, update, plane.tensors, old if sparse else None)
            if mode == STAGED:
                assert oracle.difference(plane.scores, oracle.scores(plane.service)) == 0
            assert update.commit(session.digest(plane.tensors)) == plane.version + 1
    plane.assert_serves(plane.new, plane.version + 1)
    if mode == IN_PLACE:
        asking.join(60)
        assert oracle.difference(asked[0], oracle.scores(plane.service)) == 0  # type: ignore[arg-type]


def test_one_percent_of_a_model_in_a_partial_update(plane: Plane) -> None:
    """Fused and split tensors too: the engine's digest is of every byte."""
    before = {
        name: value.to(torch.bfloat16) for name, value in oracle.tensors_of(plane.old, plane.names).items()
    }
    generator = torch.Generator().manual_seed(5)
    now = {}
    for name, value in before.items():
        chosen = torch.rand(value.shape, generator=generator) < 0.01
        now[name] = torch.where(chosen, value * 2 + 1, value)
    session = plane.open(STREAM)
    chunks = list(session.sparse_chunks(now, before))
    with session.begin(partial=True) as update:
        for chunk in chunks:
            update.send(sparse=chunk)
        assert update.commit(session.digest(now)) == plane.version + 1
    assert raw.now(plane.stub, digest=True).digest == session.digest(now)
    dense = sum(2 * value.numel() for value in before.values())
    assert sum(chunk.ByteSize() for chunk in chunks) * 20 < dense


def test_a_partial_update_with_a_wrong_digest_or_base_changes_nothing(plane: Plane) -> None:
    old = oracle.tensors_of(plane.old, plane.names)
    session = plane.open(STREAM)
    with pytest.raises(FailedPrecondition) as refused:
        session.begin(plane.version - 1, partial=True)
    assert refused.value.reason == Reason.BASE_VERSION_MISMATCH
    with session.begin(partial=True) as update:
        bring(session, update, plane.tensors, old)
        with pytest.raises(DataLoss) as caught:
            update.commit(session.digest(plane.tensors) ^ 1)
    assert caught.value.reason == Reason.DIGEST_MISMATCH
    plane.assert_unchanged()


def test_a_prepared_update_is_committed_or_dropped(plane: Plane) -> None:
    session = plane.open(STREAM)
    for commits in (False, True):
        with session.begin() as update:
            bring(session, update, plane.tensors, None)
            update.prepare(session.digest(plane.tensors))
            assert raw.state(plane.stub) == "STAGING"
            if commits:
                assert update.commit() == plane.version + 1
            else:
                update.abort(untouched=True)
                plane.assert_unchanged()
    plane.assert_serves(plane.new, plane.version + 1)


@pytest.mark.parametrize(
    ("mode", "digest", "text"),
    [(STAGED, None, "prepare.digest: is required"), (IN_PLACE, 1, "cannot be prepared")],
)
def test_what_cannot_be_prepared(plane: Plane, mode: int, digest: int | None, text: str) -> None:
    session = plane.open(STREAM, mode=mode)
    with session.begin() as update, pytest.raises((FailedPrecondition, ValueError), match=text):
        update.prepare(digest)
    plane.assert_unchanged()


def test_generation_goes_on_while_a_shared_update_is_staged(plane: Plane) -> None:
    """Nothing of the trainer's writes reaches the engine before the commit."""
    with plane.open(SHARED, mode=STAGED) as session, session.begin() as update:
        session.write(plane.tensors)
        prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]))
        request = inference_pb2.GenerateRequest(prompts=[prompt])
        request.sampling.max_tokens = 4
        request.sampling.ignore_eos = True
        spans = {
            span.weight_version
            for response in plane.service.inference.Generate(request, timeout=60)
            for rollout in response.rollouts
            for span in rollout.version_spans
        }
        assert spans == {plane.version}
        update.abort(untouched=True)
    plane.assert_unchanged()
