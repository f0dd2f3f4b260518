"""A job that is killed and goes on does what it would have done: the same rollouts, figures, weights and versions."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import job_runs
from tests.job_runs import ALGORITHMS, STEPS, killed, read
from tests.job_service import JobService, Place, end_jobs, job_service
from tests.services import Service, inference_service
from trainer_service.jobs import account

CHILD = "trainer_service.jobs.child"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Place:
    return Place(tmp_path_factory.mktemp("place"), checkpoints["llama"])


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[Service]:
    """The tiny Llama beside itself: what jobs of Nash-MD and XPO begin with is their reference."""
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(
            checkpoints["llama"], Path(folder), f"--reference-model={checkpoints['llama']}"
        ) as service,
    ):
        yield service


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tdj") as made:
        yield Path(made)
        end_jobs(Path(made))


@pytest.fixture(scope="module")
def jobs(folder: Path, place: Place) -> Iterator[JobService]:
    with job_service(folder, place, "--standby=1") as service:
        yield service


def run(service: JobService, job_id: str) -> job_runs.Run:
    service.wait_for(job_id, "SUCCEEDED")
    return read(service, job_id)


class Moment:
    """A moment of the training between two of its `rewarded` calls for rewards, of which the latter waits.

    To be made before the training comes to the first.
    """

    def __init__(self, place: Place, rewarded: int) -> None:
        dice = random.Random()
        self._place, self._call, self._seconds = place, dice.randrange(1, rewarded), dice.random() / 2
        place.hold(self._call)
        place.hold(self._call + 1)

    def __repr__(self) -> str:
        return f"{self._seconds:.3f} s after the reward's call {self._call}"

    def wait(self) -> None:
        self._place.wait_until_held(self._call)
        self._place.let_go(self._call)
        time.sleep(self._seconds)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_killed_training_goes_on_bit_for_bit(
    jobs: JobService, place: Place, engine: Service, algorithm: str
) -> None:
    """With an engine that outlives it, whose versions go on rising."""
    spec = job_runs.spec(place, algorithm, engine.address)
    place.fresh()
    whole = run(jobs, jobs.submit(spec).id)
    rewarded = len((place.folder / "calls").read_text())
    place.fresh()
    moment = Moment(place, rewarded)
    job = jobs.submit(spec)
    moment.wait()
    assert killed(jobs, job.id, CHILD)
    place.fresh()
    cut = run(jobs, job.id)
    assert jobs.get(job.id).attempt == 2

    assert cut.sampled == whole.sampled, moment
    assert list(cut.figures) == list(range(1, STEPS + 1))
    assert cut.figures_without("tandem/weight_version") == whole.figures_without("tandem/weight_version"), (
        moment
    )
    assert cut.digest == whole.digest, moment
    versions = list(cut.account.versions().values())
    assert versions == sorted(versions)
    assert cut.account.faults() == whole.account.faults() == []
    assert account.main([jobs.get(job.id).folder]) == 0


def test_a_job_with_an_engine_of_its_own_has_the_same_versions_too(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The service is killed, and then the training, with rollouts that wait for their step."""
    place = Place(tmp_path / "place", checkpoints["llama"])
    spec = job_runs.spec(place, "grpo", None)
    with tempfile.TemporaryDirectory(prefix="tdj") as name:
        try:
            with job_service(Path(name), place) as service:
                whole = run(service, service.submit(spec).id)
                place.fresh()
                moment = Moment(place, 2)
                job = service.submit(spec)
                place.wait_until_held(1)
                service.kill()
            with job_service(Path(name), place) as service:
                moment.wait()
                assert killed(service, job.id, CHILD)
                place.fresh()
                cut = run(service, job.id)
                assert service.get(job.id).attempt == 2
        finally:
            end_jobs(Path(name))
    assert cut.account.same(whole.account), moment
    assert cut.figures == whole.figures, moment
    assert cut.digest == whole.digest, moment
    assert cut.account.faults() == []
