"""Rollouts on their way into training, of which none is older than is allowed at the very step that trains on it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from trainer_service._trl_async import RolloutSample, TreeRow

_POLL_S = 0.2


class Staleness:
    """How many weight versions a sample may be behind, by its group's oldest token. Counts those that are more."""

    def __init__(self, version: Callable[[], int], limit: int, metrics: dict[str, list[Any]]) -> None:
        """Prepare.

        Args:
            version: the committed weight version.
            limit: versions that a sample may be behind it.
            metrics: where TRL's trainer keeps its figures.
        """
        self._version, self._limit, self._metrics = version, limit, metrics

    def exceeded(self, oldest: int) -> bool:
        """Whether a sample is dropped. It counts then."""
        if self._version() - oldest <= self._limit:
            return False
        self._metrics["sample/dropped_stale_total"].append(1.0)
        return True

    def note(self, oldest: int) -> None:
        """A sample is trained on."""
        staleness = float(self._version() - oldest)
        self._metrics["sample/staleness_mean"].append(staleness)
        self._metrics["sample/staleness_max"].append(staleness)


class Source(IterableDataset[dict[str, Any]]):
    """Scored samples as they come, in TRL's form."""

    def __init__(
        self,
        samples: queue.Queue[RolloutSample],
        staleness: Staleness,
        metrics: dict[str, list[Any]],
        waits: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            samples: those that are ready.
            staleness: which are dropped.
            metrics: where TRL's trainer keeps its figures.
            waits: called while there is none, again and again. May raise, and may mend what is in the way.
        """
        self.wait_s = 0.0
        self._samples, self._staleness, self._metrics, self._waits = samples, staleness, metrics, waits

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            sample = self._next()
            if self._staleness.exceeded(sample.model_version):
                continue
            self._metrics["sample/rollout_queue_size"].append(float(self._samples.qsize()))
            if sample.enqueued_at is not None:
                self._metrics["sample/time_in_queue_s"].append(time.time() - sample.enqueued_at)
            yield {
                "input_ids": sample.input_ids,
                "completion_mask": sample.completion_mask,
                "old_log_probs": sample.old_log_probs,
                "advantage": sample.advantage,
                "group_id": sample.group_id,
                "metrics": sample.metrics,
                "oldest": sample.model_version,
            }

    def _next(self) -> RolloutSample:
        started = time.perf_counter()
        try:
            while True:
                try:
                    return self._samples.get(timeout=_POLL_S)
                except queue.Empty:
                    self._waits()
        finally:
            self.wait_s += time.perf_counter() - started


class Fresh(IterableDataset[list[TreeRow]]):
    """Micro-batches without what has become too old since it was taken from the queue.

    TRL's own planner keeps a sample that fits no more for the next micro-batch, and its loader fetches one ahead. This
    is asked for a micro-batch right before the step that trains on it.
    """

    def __init__(self, batches: Any, staleness: Staleness) -> None:
        self._batches, self._staleness = batches, staleness

    def __iter__(self) -> Iterator[list[TreeRow]]:
        for rows in self._batches:
            fresh = [self._without_stale(row) for row in rows]
            if all(row.samples for row in fresh):
                yield fresh

    def _without_stale(self, row: TreeRow) -> TreeRow:
        kept: TreeRow = TreeRow()  # type: ignore[no-untyped-call]
        for sample in row.samples:
            if not self._staleness.exceeded(sample["oldest"]):
                self._staleness.note(sample["oldest"])
                kept.add(sample)
        return kept
