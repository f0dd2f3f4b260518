"""RewardService, as `serve` has it: who may call, what is healthy, what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import failure
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import FailedPrecondition, InvalidArgument, Reason, Unauthenticated
from tandem.reward.v1 import reward_pb2 as pb
from tandem.reward.v1 import reward_pb2_grpc
from tandem.rpc import Serving, ServingConfig, connect_aio, translate
from tests import rewards
from trainer_service.rewards import serve
from trainer_service.rewards.server import REWARD, serving

ServeReward = Callable[..., Awaitable[Serving]]
ONE = pb.ScoreRequest(rollouts=[pb.Rollout(prompt=pb.Turn(text="p"), completion=pb.Turn(text="abc"))])


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[ServeReward]:
    """Serve a function with `await served(function, **fields of ServingConfig)`."""
    running: list[Serving] = []
    with ExitStack() as stack:

        async def start(function: Any, workers: int = 1, **fields: Any) -> Serving:
            fields = {
                "addresses": (f"unix://{folder}/socket",),
                "handle_signals": False,
                "grace_s": 2.0,
            } | fields
            service = stack.enter_context(serving(function, ServingConfig(**fields), workers=workers))
            await service.start()
            service.set_serving(REWARD, True)
            running.append(service)
            return service

        yield start
        for service in running:
            service.request_stop(now=True)
            await service.wait()


def stub(channel: grpc.aio.Channel) -> reward_pb2_grpc.RewardServiceStub:
    return reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]


async def test_a_reward_for_each_rollout(served: ServeReward) -> None:
    for function in (rewards.length, rewards.awaited):
        service = await served(function, addresses=("127.0.0.1:0",), insecure=True)
        async with connect_aio(service.addresses[0]) as channel:
            answer = await stub(channel).Score(ONE)
            assert [reward.value for reward in answer.rewards] == [3.0]


async def test_no_opinion_and_nothing_are_different_from_zero(served: ServeReward) -> None:
    service = await served(lambda completions, **_: [None, 0.0])
    async with connect_aio(service.addresses[0]) as channel:
        answer = await stub(channel).Score(pb.ScoreRequest(rollouts=[*ONE.rollouts, *ONE.rollouts]))
        assert [reward.HasField("value") for reward in answer.rewards] == [False, True]
        assert not (await stub(channel).Score(pb.ScoreRequest())).rewards


async def test_nobody_scores_without_the_token_but_health_is_told(served: ServeReward) -> None:
    called: list[Any] = []
    service = await served(lambda **arguments: called.append(arguments), token="right")
    async with connect_aio(service.addresses[0]) as channel:
        error = translate(await failure(stub(channel).Score(ONE)))
        assert (type(error), error.reason) == (Unauthenticated, Reason.TOKEN_INVALID)
        request = health_pb2.HealthCheckRequest(service="tandem.reward.v1.RewardService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert called == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (
            pb.ScoreRequest(rollouts=[*ONE.rollouts, pb.Rollout(prompt=pb.Turn(text="p"))]),
            "rollouts[1].completion",
        ),
        (pb.ScoreRequest(rollouts=[pb.Rollout(completion=pb.Turn(text="c"))]), "rollouts[0].prompt"),
    ],
)
async def test_bad_requests_name_the_field(
    served: ServeReward, request_: pb.ScoreRequest, field: str
) -> None:
    service = await served(rewards.length)
    async with connect_aio(service.addresses[0]) as channel:
        error = translate(await failure(stub(channel).Score(request_)))
    assert isinstance(error, InvalidArgument)
    assert [v.field for v in error.violations] == [field]


@pytest.mark.parametrize("returned", [[], [1.0, 2.0], [float("nan")], ["1"], None], ids=str)
async def test_a_function_that_returns_no_reward_is_named(served: ServeReward, returned: Any) -> None:
    def mine(**_: Any) -> Any:
        return returned

    service = await served(mine)
    async with connect_aio(service.addresses[0]) as channel:
        error = translate(await failure(stub(channel).Score(ONE)))
    assert (type(error), error.reason) == (InvalidArgument, Reason.REWARD_INVALID)
    assert "the reward function mine failed" in error.message


async def test_what_a_function_raises_is_not_told(served: ServeReward) -> None:
    def mine(**_: Any) -> Any:
        raise ValueError("secret")

    service = await served(mine)
    async with connect_aio(service.addresses[0]) as channel:
        error = translate(await failure(stub(channel).Score(ONE)))
    assert error.reason is Reason.BUG
    assert "secret" not in str(error)


@pytest.mark.parametrize("workers", [1, 3])
async def test_a_function_runs_in_as_many_threads_as_it_may(served: ServeReward, workers: int) -> None:
    lock, go = threading.Lock(), threading.Event()
    now = most = 0

    def count(completions: list[str], **_: Any) -> list[float]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if most == workers:  # as many as may are here: nobody waits for another one
            go.set()
        go.wait(10)
        with lock:
            now -= 1
        return [0.0]

    service = await served(count, workers=workers)
    async with connect_aio(service.addresses[0]) as channel:
        calls = [stub(channel).Score(ONE) for _ in range(6)]
        await asyncio.gather(*calls)
    assert most == workers


async def test_health_is_answered_while_a_function_works(served: ServeReward) -> None:
    go = threading.Event()

    def slow(**_: Any) -> list[float]:
        go.wait(10)
        return [0.0]

    service = await served(slow)
    async with connect_aio(service.addresses[0]) as channel:
        call = stub(channel).Score(ONE)
        request = health_pb2.HealthCheckRequest(service=REWARD)
        await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        assert not call.done()
        go.set()
        await call


def test_what_cannot_be_served_is_refused_before_anything_is_bound(folder: Path) -> None:
    address = f"unix://{folder}/socket"
    with pytest.raises(InvalidArgument, match="function: is no function"):
        serve(None, address)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="workers: must be at least 1"):
        serve(rewards.length, address, workers=0)
    with pytest.raises(InvalidArgument, match="would serve everybody"):
        serve(rewards.length, "127.0.0.1:0")
    assert not (folder / "socket").exists()


async def test_an_address_that_is_taken_is_told(served: ServeReward) -> None:
    service = await served(rewards.length)
    with pytest.raises(FailedPrecondition) as caught:
        await asyncio.to_thread(serve, rewards.length, service.addresses[0])
    assert caught.value.reason is Reason.ADDRESS_IN_USE
