"""A RewardService of a Python function, for who writes rewards in Python and wants them in a process of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from tandem.errors import invalid
from tandem.reward.v1 import reward_pb2 as pb
from tandem.reward.v1 import reward_pb2_grpc
from trainer_service.rewards import messages
from trainer_service.rewards.checks import RewardFunction, checked, is_async

if TYPE_CHECKING:
    from tandem.rpc import Serving, ServingConfig
    from tandem.rpc.listen import Tls

REWARD = "tandem.reward.v1.RewardService"


def serve(
    function: RewardFunction,
    address: str,
    *,
    token: str | None = None,
    tls: Tls | None = None,
    insecure: bool = False,
    workers: int = 1,
) -> None:
    """Serve a reward function until SIGTERM or SIGINT.

    Args:
        function: with TRL's signature. It gets `prompts`, `completions`, `completion_ids`, the dataset's columns, and a
            `trainer_state` that has `global_step`.
        address: `unix:///absolute/path` or `host:port`.
        token: what callers must send. `host:port` needs it, or clients' certificates in `tls`.
        tls: for `host:port`.
        insecure: whether `host:port` may go without.
        workers: in how many threads the function may run at once. An async one runs in the event loop, and as often as
            it is called.

    Raises:
        InvalidArgument: the function or the address is none that can be served.
        FailedPrecondition: ADDRESS_IN_USE.
    """
    from tandem.rpc import ServingConfig

    config = ServingConfig(
        addresses=(address,),
        token=token,
        tls=tls,
        insecure=insecure,
        handle_signals=threading.current_thread() is threading.main_thread(),
    )
    asyncio.run(run(function, config, workers=workers))


async def run(function: RewardFunction, config: ServingConfig, *, workers: int = 1) -> None:
    """`serve`, inside an event loop and with everything that a service can be told."""
    with serving(function, config, workers=workers) as service:
        await service.start()
        service.set_serving(REWARD, True)
        await service.wait()


@contextmanager
def serving(function: RewardFunction, config: ServingConfig, *, workers: int = 1) -> Iterator[Serving]:
    """The service, not started. The function's threads end with the context, but for what still runs in them."""
    from tandem.rpc import Serving

    if workers < 1:
        raise invalid("workers", f"must be at least 1, is {workers}")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reward")
    try:
        service = Serving(config)
        servicer = RewardServicer(checked(function, field="function"), pool)
        service.add(reward_pb2_grpc.add_RewardServiceServicer_to_server, servicer, REWARD)
        yield service
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Calls a checked reward function."""

    def __init__(self, function: RewardFunction, pool: ThreadPoolExecutor) -> None:
        self._function = function
        self._pool = pool

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802  # the proto's
        if not request.rollouts:
            return pb.ScoreResponse()
        loop = asyncio.get_running_loop()
        # Pictures may take a second to decode, and the function as long as it likes.
        found = await loop.run_in_executor(self._pool, messages.arguments, request)
        if is_async(self._function):
            rewards = await self._function(**found)
        else:
            rewards = await loop.run_in_executor(self._pool, partial(self._function, **found))
        return pb.ScoreResponse(rewards=[pb.Reward(value=value) for value in rewards])
