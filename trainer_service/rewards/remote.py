"""A reward function that asks a RewardService."""

from __future__ import annotations

import itertools
import os
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any

import grpc

from tandem import rpc
from tandem.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Reason,
    TandemError,
    Unavailable,
    Violation,
    invalid,
)
from tandem.reward.v1 import reward_pb2 as pb
from tandem.reward.v1 import reward_pb2_grpc
from tandem.rpc.address import parse
from tandem.rpc.trust import check_token
from trainer_service.rewards import messages
from trainer_service.rewards.checks import verified

#: Of two tries of one batch. It doubles with each.
_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 1.0


class RemoteReward:
    """Calls a RewardService as TRL calls a reward function. Safe to use from several threads.

    It connects with its first call, in the process that makes it, and is not for a fork of that process. What it was
    made from is all that is copied or pickled of it.
    """

    _lock: threading.Lock
    _channel: grpc.Channel | None

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        batch_size: int = 64,
        max_attempts: int | None = None,
        max_request_bytes: int = 3 << 20,
        columns: Collection[str] | None = None,
        name: str | None = None,
        **channel: Any,
    ) -> None:
        """Nothing is called yet.

        Args:
            address: `unix:///absolute/path` or `host:port`.
            token: the service's token.
            timeout_s: deadline in seconds of a whole call, every try of it included.
            batch_size: most rollouts of one request. All requests of a call run at once.
            max_attempts: how often a request is sent before the service counts as down. As often as the deadline
                allows if None.
            max_request_bytes: most bytes of one request, unless one rollout alone has more. gRPC's servers take 4 MiB
                if nobody told them otherwise.
            columns: which of the dataset's columns are sent. All if None.
            name: in metrics and errors. By default the socket's name, or host:port.
            channel: further arguments of `tandem.rpc.connect`, such as `ca_file`.

        Raises:
            InvalidArgument: the address, the token or a limit is malformed.
        """
        parsed = parse(address)
        if token is not None:
            check_token(token)
        limits = {
            "timeout_s": timeout_s,
            "batch_size": batch_size,
            "max_attempts": max_attempts,
            "max_request_bytes": max_request_bytes,
        }
        for field, value in limits.items():
            if value is not None and not value > 0:
                raise invalid(field, f"must be more than 0, is {value}")
        self.address = address
        self.__name__ = name or (parsed.path.stem if parsed.path else str(parsed))
        self._token = token
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._max_attempts = max_attempts
        self._max_request_bytes = max_request_bytes
        self._columns = None if columns is None else list(columns)
        self._arguments = channel
        self._forget()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The reward of each completion. None where the service has no opinion.

        Args:
            prompts: texts or chats.
            completions: one for each prompt.
            completion_ids: their token ids.
            columns: the dataset's, and what else TRL passes, of which `trainer_state` is read.

        Raises:
            InvalidArgument: REWARD_INVALID, the service answered with another number of rewards or with one that is not
                finite; or a column cannot be sent.
            Unavailable: nobody answered, after all tries that the deadline left time for.
            DeadlineExceeded: somebody is there, and did not answer in time.
            TandemError: what else the service says.
        """
        found = messages.rollouts(prompts, completions, completion_ids, columns, self._columns)
        step = int(getattr(columns.get("trainer_state"), "global_step", 0))
        requests = [
            pb.ScoreRequest(request_id=uuid.uuid4().hex, rollouts=batch, global_step=step)
            for batch in messages.batches(found, self._batch_size, self._max_request_bytes)
        ]
        rewards = itertools.chain.from_iterable(self._score(requests))
        values = [reward.value if reward.HasField("value") else None for reward in rewards]
        return verified(values, len(prompts), self.__name__, subject=f"the reward service {self}")

    def check(self) -> None:
        """Ask whether the service is there, before anything is generated. Errors are those of a call."""
        self._score([pb.ScoreRequest(request_id=uuid.uuid4().hex)])

    def close(self) -> None:
        """Close the channel. A later call opens another."""
        with self._lock:
            if self._channel is not None:
                self._channel.close()
            self._channel = None

    def _score(self, requests: Sequence[pb.ScoreRequest]) -> list[Sequence[pb.Reward]]:
        """Rewards of each request. What failed in a way that may pass is sent again, until the deadline."""
        deadline = time.monotonic() + self._timeout_s
        done: dict[int, Sequence[pb.Reward]] = {}
        delay = _BACKOFF_S
        for attempt in itertools.count(1):
            error = self._try(requests, done, deadline)
            if error is None:
                return [done[i] for i in range(len(requests))]
            pause = max(delay, error.retry_after or 0.0)
            if attempt == self._max_attempts or time.monotonic() + pause >= deadline:
                raise self._told(error, attempt) from error
            time.sleep(pause)
            delay = min(2 * delay, _MAX_BACKOFF_S)
        raise AssertionError  # the loop returns or raises

    def _try(
        self, requests: Sequence[pb.ScoreRequest], done: dict[int, Sequence[pb.Reward]], deadline: float
    ) -> TandemError | None:
        """Send what is not done, all at once. Returns an error after which another try may help."""
        left = max(deadline - time.monotonic(), 0.001)
        try:
            stub = self._stub()
        except InvalidArgument as error:
            raise self._told(error) from error
        calls = {
            i: stub.Score.future(request, timeout=left) for i, request in enumerate(requests) if i not in done
        }
        again: TandemError | None = None
        try:
            for i, call in calls.items():
                try:
                    with rpc.translated():
                        rewards = call.result().rewards
                except TandemError as error:
                    if not isinstance(error, Unavailable) and error.retry_after is None:
                        raise self._told(error) from error
                    again = again or error
                else:
                    self._check_count(requests[i], rewards)
                    done[i] = rewards
        finally:
            for call in calls.values():
                call.cancel()
        return again

    def _check_count(self, request: pb.ScoreRequest, rewards: Sequence[pb.Reward]) -> None:
        if len(rewards) != len(request.rollouts):
            what = f"returned {len(rewards)} rewards for {len(request.rollouts)} rollouts"
            raise InvalidArgument(
                Reason.REWARD_INVALID,
                f"the reward service {self} {what}",
                violations=[Violation(self.__name__, what)],
                metadata={"reward_function": self.__name__, "address": self.address},
            )

    def _told(self, error: TandemError, attempts: int = 1) -> TandemError:
        """The error with who it is of."""
        why = error.message
        if isinstance(error, Unavailable):
            tries = f"{attempts} {'try' if attempts == 1 else 'tries'}"
            why = f"is down ({tries}, {self._timeout_s:g} s at most): {why}"
        elif isinstance(error, DeadlineExceeded):
            why = f"has not answered in {self._timeout_s:g} s: {why}"
        else:
            why = f"failed: {why}"
        return type(error)(
            error.reason,
            f"the reward service {self} {why}",
            violations=error.violations,
            metadata={**error.metadata, "reward_function": self.__name__, "address": self.address},
        )

    def _stub(self) -> Any:
        with self._lock:
            if self._channel is None:
                self._channel = rpc.connect(self.address, token=self._token, **self._arguments)
            return reward_pb2_grpc.RewardServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._channel = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_channel")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __str__(self) -> str:
        return f"{self.__name__} at {self.address}"

    def __repr__(self) -> str:
        return f"RemoteReward({self.address!r}, name={self.__name__!r})"


def from_environment(address: str, *, field: str) -> RemoteReward:
    """A RemoteReward with the token and the files that the environment names.

    TANDEM_REWARD_TOKEN, and for a service on another host TANDEM_REWARD_CA_FILE, …_CERT_FILE, …_KEY_FILE.

    Raises:
        InvalidArgument: names `field`.
    """
    names = {"token": "TOKEN", "ca_file": "CA_FILE", "cert_file": "CERT_FILE", "key_file": "KEY_FILE"}
    given = {key: os.environ.get(f"TANDEM_REWARD_{name}") for key, name in names.items()}
    arguments: dict[str, Any] = {key: value for key, value in given.items() if value}
    if parse(address, field=field).is_unix:
        arguments = {key: value for key, value in arguments.items() if key == "token"}
    return RemoteReward(address, **arguments)
