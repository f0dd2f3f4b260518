"""What the servicers serve: the engine and its policy, once they are there, and whether tokens can be had."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from enum import StrEnum

from inference_service.policy import Policy, WeightState
from inference_service.sessions import Sessions
from tandem.errors import Reason, Unavailable

_TICK_S = 0.25  # how soon a call that waits for a version notices that the engine died


class ServingState(StrEnum):
    """Whether tokens can be had."""

    LOADING = "LOADING"
    SERVING = "SERVING"
    PAUSED = "PAUSED"
    TORN = "TORN"
    DEAD = "DEAD"
    DRAINING = "DRAINING"
    ASLEEP = "ASLEEP"


class Host:
    """Holds what is loaded. Everything else asks here, and gets a clear error while it is not."""

    def __init__(self) -> None:
        self._loaded: tuple[Policy, Sessions] | None = None
        #: Whether the service is about to stop. What comes until it refuses calls is still served.
        self.draining: Callable[[], bool] = lambda: False
        #: To be called when `state` may have changed.
        self.changed: Callable[[], None] = lambda: None

    def load(self, policy: Policy, sessions: Sessions) -> None:
        """The engine is ready."""
        self._loaded = policy, sessions

    @property
    def loaded(self) -> Policy | None:
        """The policy, in whatever state, once there is one."""
        return self._loaded[0] if self._loaded is not None else None

    @property
    def policy(self) -> Policy:
        """The policy.

        Raises:
            Unavailable: ENGINE_LOADING, ENGINE_DEAD.
        """
        if self._loaded is None:
            raise Unavailable(Reason.ENGINE_LOADING, "the model is being loaded", retry_after=1.0)
        policy = self._loaded[0]
        if policy.engine.dead:
            raise Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again")
        return policy

    @property
    def sessions(self) -> Sessions:
        """The trainers' sessions. Raises as `policy` does."""
        loaded, _ = self._loaded, self.policy
        if loaded is None:
            raise AssertionError("the policy's absence raised nothing")
        return loaded[1]

    def generating(self) -> Policy:
        """The policy, where tokens can be had of it now or after a pause.

        Raises:
            Unavailable: as `policy`, and ENGINE_TORN, ENGINE_ASLEEP.
        """
        policy = self.policy
        if policy.torn:
            raise policy.torn_error()
        if policy.engine.asleep:
            raise Unavailable(Reason.ENGINE_ASLEEP, "the engine sleeps; WakeUp first")
        return policy

    async def at_least(self, version: int, seconds: float | None) -> None:
        """Wait until `version`, or a later one, is committed: for `seconds`, or as long as the caller likes.

        Raises:
            Unavailable: WEIGHTS_TOO_OLD, DRAINING, and as `generating`.
        """
        policy, changed, loop = self.generating(), asyncio.Event(), asyncio.get_running_loop()
        end = None if seconds is None else loop.time() + seconds
        policy.changed.append(changed.set)
        try:
            while policy.version < version:
                left = _TICK_S if end is None else min(end - loop.time(), _TICK_S)
                if left <= 0:
                    raise _too_old(policy.version, version)
                if self.draining():
                    raise Unavailable(Reason.DRAINING, "the service is shutting down")
                changed.clear()
                # Not wait_for: Python 3.11's loses a cancellation that comes with the change.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await changed.wait()
                policy = self.generating()
        finally:
            policy.changed.remove(changed.set)

    def state(self) -> tuple[ServingState, str]:
        """Whether tokens can be had, and why not where they cannot."""
        if self.draining():
            return ServingState.DRAINING, "the service is shutting down"
        try:
            policy = self.generating()
        except Unavailable as error:
            return ServingState(str(error.reason).removeprefix("ENGINE_")), error.message
        if policy.engine.paused or policy.state is WeightState.WRITING:
            return ServingState.PAUSED, ""
        return ServingState.SERVING, ""


def _too_old(version: int, wanted: int) -> Unavailable:
    return Unavailable(
        Reason.WEIGHTS_TOO_OLD,
        f"weight version {version} is committed, the request needs {wanted}",
        metadata={"weight_version": str(version), "min_weight_version": str(wanted)},
    )
