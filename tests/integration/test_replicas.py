"""Rollouts over two real services, of which one is old, stands still, and dies."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.inference.v1 import inference_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.integration.calls import idle, stats, until
from tests.services import Service, inference_service
from trainer_service.client import Group, InferenceClient
from trainer_service.replicas import Replicas

#: Enough to be under way for a while.
GROUPS = [Group([5 + i, *range(3, 3 + i)], 6) for i in range(10)]
SAMPLING = {"seed": 11, "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def other(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """A replica of `exact`, which has the same weights. It is killed in the end."""
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoints["llama"], Path(folder), dtype="float32", max_num_seqs="64") as service,
    ):
        yield service


@pytest.fixture
def replicas(exact: Service, other: Service) -> Iterator[Replicas]:
    replicas = Replicas([InferenceClient(exact.address), InferenceClient(other.address)])
    yield replicas
    replicas.close()


@pytest.fixture(scope="module")
def alone(exact: Service) -> list[list[list[int]]]:
    """What one service gives."""
    client = InferenceClient(exact.address)
    rollouts = client.generate(GROUPS, SAMPLING)
    client.close()
    return tokens(rollouts)


def tokens(rollouts: list[list[pb.Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.token_ids) for rollout in group] for group in rollouts]


def finished(service: Service) -> int:
    return stats(service).rollouts_finished


def test_both_do_their_part(
    replicas: Replicas, exact: Service, other: Service, alone: list[list[list[int]]]
) -> None:
    before = [finished(service) for service in (exact, other)]
    assert tokens(replicas.generate(GROUPS, SAMPLING)) == alone
    assert [finished(s) - n for s, n in zip((exact, other), before, strict=True)] == [30, 30]


def test_a_replica_with_older_weights_gives_nothing(
    replicas: Replicas, exact: Service, other: Service, alone: list[list[list[int]]]
) -> None:
    exact.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)
    needed = stats(exact).weight_version
    assert stats(other).weight_version < needed
    before = stats(other).tokens_generated
    rollouts = replicas.generate(GROUPS, SAMPLING, min_weight_version=needed)
    assert tokens(rollouts) == alone
    assert stats(other).tokens_generated == before
    assert {s.weight_version for group in rollouts for r in group for s in r.version_spans} == {needed}


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["SIGSTOP", "kill -9"])
def test_a_batch_survives_the_loss_of_a_replica(
    replicas: Replicas,
    exact: Service,
    other: Service,
    alone: list[list[list[int]]],
    caplog: pytest.LogCaptureFixture,
    how: signal.Signals,
) -> None:
    """Its processes are stopped, or killed, in the middle of a batch: no rollout is lost, and all are what they were
    to be.
    """
    processes = [other.process.pid, *other.children()]
    idle(other)
    before = stats(other).tokens_generated
    try:
        with ThreadPoolExecutor(1) as thread:
            batch = thread.submit(replicas.generate, GROUPS, SAMPLING)
            until(lambda: stats(other).tokens_generated > before, 60, "it is under way")
            for pid in processes:
                os.kill(pid, how)
            assert tokens(batch.result(60)) == alone
        assert "gave up" in caplog.text, "the batch had not ended before"
        assert replicas.alive == [exact.address] or how == signal.SIGKILL
        until(lambda: replicas.alive == [exact.address], 60, "it is known to be lost")
        assert tokens(replicas.generate(GROUPS[:2], SAMPLING)) == alone[:2]
    finally:
        for pid in processes if how == signal.SIGSTOP else ():
            os.kill(pid, signal.SIGCONT)
    if how == signal.SIGSTOP:
        until(lambda: len(replicas.alive) == 2, 60, "it is back")
        idle(other)
