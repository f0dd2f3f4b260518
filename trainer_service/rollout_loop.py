"""TRL's loop of rollouts that are scored while others are sampled, with the turns sampled by an inference service."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tandem.errors import Reason, TandemError
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service._trl_async import AsyncRolloutLoop, RolloutSample
from trainer_service.client import Group, InferenceClient, is_gone
from trainer_service.replicas import Replicas

logger = logging.getLogger(__name__)

_AGAIN_S = 0.2


@dataclass
class Rollout:
    """The rollout that a task makes: the `index`-th of its group, and its turn."""

    group_id: int
    index: int
    turn: int = 0
    oldest: int | None = None  # weight version of any of its tokens


_HERE: ContextVar[Rollout] = ContextVar("rollout")


class Turns:
    """Samples turns, each until it is sampled: by an engine that came back, of a version that is not too old."""

    def __init__(
        self,
        client: InferenceClient | Replicas,
        sampling: pb.SamplingParams,
        *,
        version: Callable[[], int],
        seed: int,
        lora: str = "",
        timeout_s: float,
        patience_s: float,
    ) -> None:
        """Prepare.

        Args:
            client: the service; nobody else's, since `stop` closes it.
            sampling: how, without a seed.
            version: the weight version that was committed last: no token is of an older one.
            seed: of all rollouts.
            lora: a loaded adapter to sample with.
            timeout_s: deadline of a turn.
            patience_s: for how long an engine that went away is waited for.
        """
        self._client, self._sampling, self._version = client, sampling, version
        self._seed, self._lora = seed, lora
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._stopped = threading.Event()
        #: The version that was needed when an engine went away, or lacked it, as one that was started again does.
        self.lost = -1

    def sample(self, prompt_ids: list[int], rollout: Rollout) -> pb.Rollout:
        """The next turn. Blocks; after `stop` it has no tokens.

        Raises:
            TandemError: what trying again does not change, or the engine did not come back.
        """
        name = f"{self._seed}/{rollout.group_id}/{rollout.index}/{rollout.turn}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1
        gone_since: float | None = None
        while not self._stopped.is_set():
            needed = self._version()
            try:
                ((answer,),) = self._client.generate(
                    [Group(prompt_ids, seed=seed)],
                    self._sampling,
                    timeout_s=self._timeout_s,
                    lora=self._lora,
                    min_weight_version=needed,
                    version_wait_s=0.0,
                )
            except (TandemError, ValueError) as error:  # a ValueError of a channel that was closed
                if self._stopped.is_set():
                    break
                if not isinstance(error, TandemError):
                    raise
                if error.reason == Reason.QUEUE_FULL:
                    self._stopped.wait(error.retry_after or 1.0)
                    continue
                if not is_gone(error) and error.reason != Reason.LORA_NOT_FOUND:
                    raise
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > self._patience_s:
                    raise
                if self.lost != needed:
                    logger.warning("a turn could not be sampled, trying again: %s", error)
                self.lost = needed
            else:
                if answer.token_ids and answer.finish_reason != pb.FINISH_REASON_ABORTED:
                    return answer
            self._stopped.wait(_AGAIN_S)
        return pb.Rollout()

    def stop(self) -> None:
        """End what is sampled, and sample no more."""
        self._stopped.set()
        self._client.close()


class RemoteLoop(AsyncRolloutLoop):
    """TRL's loop: prompts, tools, environments, rewards and advantages are its own."""

    def __init__(self, *, turns: Turns, **kwargs: Any) -> None:
        self._turns = turns
        self._numbers: dict[int, int] = defaultdict(int)  # rollouts that a group has begun
        self._oldest: dict[int, int] = {}
        self.error: BaseException | None = None  # what ended it
        super().__init__(**kwargs)
        self._calls = ThreadPoolExecutor(self.max_inflight_tasks, "tandem-turns")

    async def _run_loops(self, stop_event: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._generate_loop(stop_event=stop_event))
                tasks.create_task(self._score_loop(stop_event=stop_event))
        except BaseExceptionGroup as errors:
            self.error = errors.exceptions[0]  # there before TRL's loop says that it failed
            raise
        finally:
            self._turns.stop()
            self._calls.shutdown(wait=True, cancel_futures=True)
            await asyncio.get_running_loop().shutdown_default_executor()

    async def _generate_one(self, prompt: Any, tool_dict: Any, tools: Any, group_id: int = 0) -> Any:
        rollout = Rollout(group_id, self._numbers[group_id])
        self._numbers[group_id] += 1
        if self._numbers[group_id] == self.num_generations:
            del self._numbers[group_id]
        _HERE.set(rollout)  # each rollout is a task, with a context of its own
        made = await super()._generate_one(prompt, tool_dict, tools, group_id)
        if rollout.oldest is not None:
            self._oldest[group_id] = min(self._oldest.get(group_id, rollout.oldest), rollout.oldest)
        return made

    async def _generate_one_turn(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        rollout, loop = _HERE.get(), asyncio.get_running_loop()
        answer = await loop.run_in_executor(self._calls, self._turns.sample, list(prompt_ids), rollout)
        if (
            not answer.token_ids
        ):  # it is the end: nothing of this is scored, and TRL cannot read an empty turn
            return [self.eos_token_ids[0]], [0.0]
        rollout.turn += 1
        versions = [span.weight_version for span in answer.version_spans]
        rollout.oldest = min([*versions, *([] if rollout.oldest is None else [rollout.oldest])], default=None)
        return list(answer.token_ids), list(answer.logprobs)

    async def _score_group(self, group: Any) -> list[RolloutSample]:
        """TRL's, each sample as old as the oldest token of its group: a group is trained on whole, or not at all."""
        samples: list[RolloutSample] = await super()._score_group(group)
        oldest = self._oldest.pop(group.group_id, group.model_version)
        for sample in samples:
            sample.model_version = oldest
        return samples
