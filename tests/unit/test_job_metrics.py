"""Jobs by state, for Prometheus."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import REGISTRY

from tandem.errors import Reason, Unavailable
from tests.jobs import spec
from trainer_service.jobs.states import JobState, Move
from trainer_service.jobs.store import open_store
from trainer_service.metrics import JobMetrics


def _shown() -> dict[str, float | None]:
    return {state: REGISTRY.get_sample_value("tandem_jobs", {"state": state}) for state in JobState}


def test_jobs_by_state(tmp_path: Path) -> None:
    store = open_store("", tmp_path)
    store.lock()
    metrics = JobMetrics(store)
    try:
        for name in ("a", "b", "c"):
            store.create(name, spec())
        store.move("b", Move.CANCEL)
        assert _shown() == dict.fromkeys(JobState, 0) | {JobState.QUEUED: 2, JobState.CANCELLED: 1}
        store.delete("a")
        assert _shown()[JobState.QUEUED] == 1

        def refuse() -> dict[JobState, int]:
            raise Unavailable(Reason.UNREACHABLE, "the store does not answer")

        store.count = refuse  # type: ignore[method-assign]
        assert set(_shown().values()) == {None}  # no figure rather than a wrong one
    finally:
        metrics.close()
        store.close()
    assert set(_shown().values()) == {None}
