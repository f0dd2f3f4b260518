"""One batch of rollouts over several replicas, each rollout asked of one at a time, and given once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tandem.errors import Reason, TandemError, Unavailable
from tandem.inference.v1 import inference_pb2 as pb
from trainer_service.batches import Sampling, Wanted, complete
from trainer_service.client import Group, InferenceClient

logger = logging.getLogger(__name__)

#: What one replica says and another may not: the work goes elsewhere.
_ELSEWHERE = (Reason.SESSION_NOT_FOUND, Reason.QUEUE_FULL, Reason.LORA_NOT_FOUND)


@dataclass(eq=False)
class Replica:
    """One of the services, as far as its client knows."""

    client: InferenceClient
    index: int
    answers: bool = True  # it did when it was last asked, or was not asked yet
    serves: bool = True  # it said so
    load: int = 0  # rollouts that it was asked for and has not given
    parts: set[_Part] = field(default_factory=set)


class Pool(Protocol):
    """Who knows the replicas."""

    def usable(self, without: Collection[Replica] = ()) -> list[Replica]: ...

    def choose(self, tokens: Sequence[int], count: int, among: Sequence[Replica]) -> Replica: ...

    def given(self, replica: Replica, count: int) -> None: ...


@dataclass(frozen=True)
class _Run:
    """Some rollouts of one group, one after the other."""

    group: int
    first: int
    count: int


class _Part:
    """What one replica is asked for: read by a thread of its own."""

    def __init__(
        self, replica: Replica, runs: Sequence[_Run], sampling: Sampling, events: queue.SimpleQueue[Any]
    ):
        self.replica, self.runs = replica, runs
        self.left = {(run.group, run.first + k) for run in runs for k in range(run.count)}
        self.cancelled = False
        self._sampling, self._events = sampling, events
        self._thread = threading.Thread(target=self._read, name="tandem-rollouts", daemon=True)
        replica.parts.add(self)
        self._thread.start()

    def cancel(self) -> None:
        """End it, from any thread."""
        self.cancelled = True
        self._sampling.cancel()

    def join(self) -> None:
        """Wait until its thread is gone."""
        self._thread.join()
        self.replica.parts.discard(self)

    def _read(self) -> None:
        error: TandemError | None = None
        try:
            for index, k, rollout in self._sampling:
                run = self.runs[index]
                self._events.put((self, (run.group, run.first + k), rollout))
        except TandemError as raised:
            error = raised
        self._events.put((self, None, error))


class Spread:
    """One batch over the replicas. Each rollout is asked of one replica at a time."""

    def __init__(
        self,
        replicas: Pool,
        groups: list[Group],
        seeds: list[int],
        params: pb.SamplingParams,
        wanted: Wanted,
        end: float,
    ) -> None:
        self._replicas, self._groups, self._seeds = replicas, groups, seeds
        self._params = pb.SamplingParams()
        self._params.CopyFrom(params)
        self._params.ClearField("seed")
        self._wanted, self._end = wanted, end
        self._done: list[list[pb.Rollout | None]] = [[None] * group.n for group in groups]
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._parts: set[_Part] = set()
        self._refused: dict[Replica, TandemError] = {}  # who does not do it, at present

    def run(self) -> list[list[pb.Rollout]]:
        try:
            self._ask()
            while self._parts:
                part, place, what = self._events.get()
                if place is not None:
                    group, k = place
                    self._done[group][k] = what
                    part.left.remove(place)
                    self._replicas.given(part.replica, 1)
                    continue
                self._parts.discard(part)
                part.join()
                self._replicas.given(part.replica, len(part.left))
                if what is not None:
                    self._lost(part, what)
                elif part.left:
                    break
            return complete(self._done)
        finally:
            for part in self._parts:
                part.cancel()
            for part in self._parts:
                part.join()
                self._replicas.given(part.replica, len(part.left))

    def _lost(self, part: _Part, error: TandemError) -> None:
        """Ask others for what a replica did not give."""
        address = part.replica.client.address
        if part.cancelled:
            error = Unavailable(Reason.UNREACHABLE, f"{address} does not answer")
        elif not isinstance(error, Unavailable) and error.reason not in _ELSEWHERE:
            raise error
        logger.warning("%s gave up %d rollouts: %s", address, len(part.left), error)
        self._refused[part.replica] = error
        if not self._replicas.usable(self._refused):
            self._wait_for_room(error)
        self._ask(part.left)

    def _wait_for_room(self, error: TandemError) -> None:
        """Where all that is in the way is that others have the room, wait for it."""
        waits = [e.retry_after or 1.0 for e in self._refused.values() if e.reason == Reason.QUEUE_FULL]
        if not waits or time.monotonic() + min(waits) > self._end:
            raise error
        time.sleep(min(waits))
        self._refused = {r: e for r, e in self._refused.items() if e.reason != Reason.QUEUE_FULL}

    def _ask(self, places: Collection[tuple[int, int]] | None = None) -> None:
        """Begin what is missing, or the `places` of it, spread over the replicas."""
        among = self._replicas.usable(self._refused)
        if not among:
            raise nobody()
        shares: dict[Replica, list[_Run]] = {}
        for run in self._runs(places):
            tokens = self._groups[run.group].token_ids
            shares.setdefault(self._replicas.choose(tokens, run.count, among), []).append(run)
        for replica, runs in shares.items():
            asked = [
                Group(group.token_ids, run.count, group.images, (self._seeds[run.group] + run.first) % 2**64)
                for run in runs
                for group in [self._groups[run.group]]
            ]
            left = max(self._end - time.monotonic(), 0.001)
            sampling = replica.client.sample(asked, self._params, self._wanted, left)
            self._parts.add(_Part(replica, runs, sampling, self._events))

    def _runs(self, places: Collection[tuple[int, int]] | None) -> Iterator[_Run]:
        """Groups whole, or what is left of them."""
        if places is None:
            yield from (_Run(index, 0, group.n) for index, group in enumerate(self._groups))
            return
        begin: tuple[int, int] | None = None
        count = 0
        for group, k in sorted(places):
            if begin is not None and (group, k) == (begin[0], begin[1] + count):
                count += 1
                continue
            if begin is not None:
                yield _Run(*begin, count)
            begin, count = (group, k), 1
        if begin is not None:
            yield _Run(*begin, count)


def nobody() -> Unavailable:
    """The error where there is nobody to ask."""
    return Unavailable(Reason.UNREACHABLE, "no replica holds the weights")
