"""Rollouts, and trainers, over two real services, of which one is old, stands still, and dies."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tandem.errors import InvalidArgument
from tandem.inference.v1 import inference_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.asynchronous import arguments, prompts, tokenizer
from tests.faults import raw
from tests.integration.calls import idle, stats, until
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, make, model_of, reward
from trainer_service.client import Group, InferenceClient
from trainer_service.replicas import Replicas
from trainer_service.trainers import AsyncGRPOTrainer

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")

#: Enough to be under way for a while.
MANY = [Group([5 + i, *range(3, 3 + i)], 6) for i in range(30)]
GROUPS = MANY[:10]
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
    """What one service gives of MANY, and so of those that they begin with."""
    client = InferenceClient(exact.address)
    rollouts = client.generate(MANY, SAMPLING)
    client.close()
    return tokens(rollouts)


def tokens(rollouts: list[list[pb.Rollout]]) -> list[list[list[int]]]:
    return [[list(rollout.token_ids) for rollout in group] for group in rollouts]


def finished(service: Service) -> int:
    return stats(service).rollouts_finished


def test_both_do_their_part(
    replicas: Replicas,
    exact: Service,
    other: Service,
    alone: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer_service.replicas._ANSWER_S", 30)  # slow on a busy machine is not dead
    before = [finished(service) for service in (exact, other)]
    assert tokens(replicas.generate(GROUPS, SAMPLING)) == alone[: len(GROUPS)]
    assert [finished(s) - n for s, n in zip((exact, other), before, strict=True)] == [30, 30]


def test_a_replica_with_older_weights_gives_nothing(
    replicas: Replicas, exact: Service, other: Service, alone: list[list[list[int]]]
) -> None:
    exact.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)
    needed = stats(exact).weight_version
    assert stats(other).weight_version < needed
    before = stats(other).tokens_generated
    rollouts = replicas.generate(GROUPS, SAMPLING, min_weight_version=needed)
    assert tokens(rollouts) == alone[: len(GROUPS)]
    assert stats(other).tokens_generated == before
    assert {s.weight_version for group in rollouts for r in group for s in r.version_spans} == {needed}


def test_a_batch_survives_a_replica_that_stands_still(
    replicas: Replicas,
    exact: Service,
    other: Service,
    alone: list[list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(5):  # on a busy machine the batch may end before we can stop it
        caplog.clear()
        with stopped(other) as stop:
            was_under_way = survives(replicas, exact, other, alone, caplog, stop)
        until(lambda: len(replicas.alive) == 2, 60, "it is back")
        if was_under_way:
            idle(other)
            return
    pytest.fail("every batch had ended before")


@contextmanager
def stopped(service: Service) -> Iterator[Callable[[], None]]:
    """What stops its processes. They go on in the end."""
    processes = [service.process.pid, *service.children()]

    def send(number: signal.Signals) -> None:
        for pid in processes:
            os.kill(pid, number)

    try:
        yield lambda: send(signal.SIGSTOP)
    finally:
        send(signal.SIGCONT)


def survives(
    replicas: Replicas,
    exact: Service,
    other: Service,
    alone: list[list[list[int]]],
    caplog: pytest.LogCaptureFixture,
    lose: Callable[[], None],
) -> bool:
    """Whether the other is lost in the middle of a batch. No rollout is, and all are what they were to be."""
    idle(other)
    before = stats(other).tokens_generated
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(replicas.generate, MANY, SAMPLING)
        until(lambda: stats(other).tokens_generated > before, 60, "it is under way")
        lose()
        assert tokens(batch.result(180)) == alone
    gave_up = "gave up" in caplog.text
    until(lambda: replicas.alive == [exact.address], 60, "it is known to be lost")
    assert tokens(replicas.generate(GROUPS[:2], SAMPLING)) == alone[:2]
    return gave_up


class Stop(TrainerCallback):
    """Stops a service after the second step."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.stop()


def test_trainers_take_several_addresses_and_outlive_one_of_them(
    exact: Service, other: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """First a trainer over both; then an asynchronous one, which loses one of them."""
    pair = [exact, other]
    addresses = [service.address for service in pair]
    before = [finished(service) for service in pair]
    model = model_of(checkpoints["llama"], torch.float32)
    both: Any = SimpleNamespace(address=addresses)
    trainer = make("grpo", both, model, tmp_path / "a", vllm_mode="server", max_steps=2)
    trainer.train()
    assert trainer.policy_weights.holding() == set(addresses)
    trainer.vllm_generation.sync_weights()
    for service, count in zip(pair, before, strict=True):
        assert_same_bits(service, model)
        assert finished(service) > count
    trainer.close()
    with stopped(other) as stop:
        lasting = AsyncGRPOTrainer(
            str(checkpoints["llama"]),
            reward,
            arguments(tmp_path / "b", max_inflight_tasks=32),
            prompts(),
            processing_class=tokenizer(),
            callbacks=[Stop(stop)],
            inference_address=addresses,
        )
        lasting.train()
        assert lasting.state.global_step == 4
        assert lasting.policy_weights.holding() == {exact.address}
        assert_same_bits(exact, lasting.model)
        assert max(logged(lasting, "sample/staleness_max")) <= 1
        lasting.close()
    for service in pair:
        raw.restore(service.weights)


def test_several_services_share_no_memory(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    both: Any = SimpleNamespace(address=["unix:///tmp/a", "unix:///tmp/b"])
    with pytest.raises(InvalidArgument, match="vllm_mode"):
        make("grpo", both, model_of(checkpoints["llama"], torch.float32), tmp_path)


def test_a_batch_survives_kill_9_of_a_replica(
    replicas: Replicas,
    exact: Service,
    other: Service,
    alone: list[list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The last test: it does not come back."""
    processes = [other.process.pid, *other.children()]

    def kill() -> None:
        for pid in processes:
            os.kill(pid, signal.SIGKILL)

    assert survives(replicas, exact, other, alone, caplog, kill), "the batch had ended before"
