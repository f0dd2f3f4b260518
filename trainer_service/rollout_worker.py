"""What TRL's asynchronous trainer asks of who makes its rollouts and of who brings its weights."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch

from trainer_service._trl_async import AsyncRolloutWorker
from trainer_service.reaching import Weights
from trainer_service.rollout_loop import RemoteLoop, Turns

logger = logging.getLogger(__name__)

_END_S = 60.0  # for what runs at the end, which nobody can interrupt


class RolloutWorker(AsyncRolloutWorker):
    """Runs the loop in a thread: what takes time is done by the service, so that no process, and no pickle, is needed.

    It is one of TRL's class for what TRL does with that class alone: a checkpoint says where in the dataset it is.
    """

    rollout_buffer: Any
    metrics_queue: Any
    _model_version_value: Any

    def __init__(self, queue_maxsize: int, version: Callable[[], int]) -> None:
        """Prepare; `describe` comes before `start`.

        Args:
            queue_maxsize: samples that wait to be trained on, 0 for any number.
            version: the weight version that was committed last.
        """
        self.rollout_buffer = queue.Queue(queue_maxsize)
        self.metrics_queue = queue.Queue(4096)
        self._version = version
        self._model_version_value = _Version(version)
        self._loop_kwargs = {"dataset_start_index": 0}
        self._turns: Callable[[], Turns] | None = None
        self._heartbeat = SimpleNamespace(value=0.0)
        self._failed = threading.Event()
        self._loop: RemoteLoop | None = None
        self._thread: threading.Thread | None = None

    def describe(self, turns: Callable[[], Turns], **loop_kwargs: Any) -> None:
        """What to make rollouts with, and of."""
        self._turns = turns
        self._loop_kwargs |= loop_kwargs

    @property
    def lost(self) -> bool:
        """Whether an engine lacks the version that was committed last."""
        return self._loop is not None and self._loop._turns.lost == self._version()

    def update_model_version(self, model_version: int) -> None:
        """It asks for itself."""

    def start(self) -> None:
        """Begin to make rollouts."""
        if self._thread is not None:
            return
        if self._turns is None:
            raise RuntimeError("describe comes before start")
        self._heartbeat.value = time.time()
        self._loop = RemoteLoop(
            **self._loop_kwargs,
            turns=self._turns(),
            rollout_buffer=self.rollout_buffer,
            model_version_value=self._model_version_value,
            heartbeat_value=self._heartbeat,
            failed_event=self._failed,
            exception_info_queue=queue.Queue(1),
            metrics_queue=self.metrics_queue,
        )
        self._thread = threading.Thread(target=self._run, name="tandem-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End what is under way, and its threads. Nothing is left of it when this returns."""
        if self._thread is None or self._loop is None:
            return
        with suppress(RuntimeError):  # it ended before
            self._loop._loop.call_soon_threadsafe(self._loop._stop_event.set)
        self._loop._turns.stop()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            logger.warning("a reward or a tool still runs %.0f s after the training's end", _END_S)
        self._thread = self._loop = None

    def check_health(self, stale_after_s: float) -> None:
        """Raise what ended the loop, or that it hangs."""
        if self._failed.is_set():
            why = self._loop.error if self._loop else None
            raise RuntimeError("no more rollouts are made") from why
        age = time.time() - self._heartbeat.value
        if age > stale_after_s:
            raise RuntimeError(f"the loop that makes rollouts hangs: nothing was heard of it for {age:.0f} s")

    def _run(self) -> None:
        assert self._loop is not None  # noqa: S101  for the type checker
        with suppress(BaseException):  # told by `check_health`
            self._loop.run()


class _Version:
    """The committed version, where TRL's loop reads a number that processes share."""

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version

    @property
    def value(self) -> int:
        return self._version()


class EngineTransfer:
    """Has the engine hold the policy. Generation goes on: the service stops it for as long as the commit needs."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def init_weight_transfer(self) -> None:
        """Open the session."""
        self.weights.open()

    def pause(self) -> None:
        """Nothing: the update stops what it must."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Bring the model as it is now, and commit it. It is not read through `iterator`: names, dtypes, adapters and
        sharded tensors are the session's to know.
        """
        self.weights.sync()

    def resume(self) -> None:
        """Nothing, as `pause`."""

    def destroy(self) -> None:
        """Nothing: the trainer's `close` ends the session."""
