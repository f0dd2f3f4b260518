"""Random kills of trainings, engines, trainer services and their attempts' leaders, while jobs of a tiny model run.

Each job is compared with one of its kind that was never killed: its rollouts, the figures of its steps, its last
weights, and, with an engine of its own, the weight versions; and its account of rollouts is checked. Before each kill
no job may have two trainings.

python -m benchmarks.kills [--kills 200] [--minutes M] [--seed S] [--engines shared|own|both] [--out FILE]
    [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import provenance
from tandem.trainer.v1 import job_pb2
from tests import job_runs, models
from tests.job_runs import ALGORITHMS, Run, killed, read, running
from tests.job_service import JobService, Place, end_jobs, job_service
from tests.services import inference_service

#: Long enough that most of a job's kills come before its end, and most of the time is no job's start.
STEPS = 60
KILLS_PER_JOB = 10
#: Of a kill, how many seconds at most after the one before, and after the training goes on: starts, steps, checkpoints.
_ANY_S, _TRAINING_S = 4.0, 2.5
#: What is killed, by the module that it runs; the service is no process of the job.
MODULES = {
    "training": "trainer_service.jobs.child",
    "leader": "trainer_service.jobs.run",
    "engine": "inference_service",
    "service": "",
}
_ENGINES = ("shared", "own")
_ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


class Services:
    """The trainer service, which is started again when it was killed: with a standby process, or without."""

    def __init__(self, folder: Path, place: Place, dice: random.Random) -> None:
        self._folder, self._place, self._dice = folder, place, dice
        self._stack = ExitStack()
        self.now = self._start()

    def kill(self) -> None:
        """Kill it, and start the next."""
        self.now.kill()
        self.close()
        self.now = self._start()

    def close(self) -> None:
        self._stack.close()

    def _start(self) -> JobService:
        standby = f"--standby={self._dice.randrange(2)}"
        return self._stack.enter_context(job_service(self._folder, self._place, standby))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no job after them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed")
    default = Path("benchmarks/results/kills.json")
    parser.add_argument("--out", type=Path, default=default, help="each run is added to those that it has")
    parser.add_argument(
        "--engines",
        choices=[*_ENGINES, "both"],
        default="both",
        help="whose the jobs' engines are (default both)",
    )
    parser.add_argument("--keep", type=Path, help="folders of jobs that went wrong are copied into it")
    arguments = parser.parse_args()
    found = Found(arguments.seed, arguments.out)
    begin, dice = time.monotonic(), random.Random(arguments.seed)
    with ExitStack() as stack:
        model = models.make(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tdm"))), "llama")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tdj")))
        stack.callback(end_jobs, folder)
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tdi")))
        engine = stack.enter_context(inference_service(model, shared, f"--reference-model={model}"))
        place = Place(folder / "place", model)
        services = Services(folder, place, dice)
        stack.callback(services.close)
        whole: dict[tuple[str, str], Run] = {}
        addresses = dict(zip(_ENGINES, (engine.address, ""), strict=True))
        chosen = [addresses[name] for name in _ENGINES if arguments.engines in (name, "both")]
        kinds = [(algorithm, address) for algorithm in ALGORITHMS for address in chosen]
        while (
            sum(found.kills.values()) < arguments.kills and time.monotonic() - begin < 60 * arguments.minutes
        ):
            kind = kinds[sum(found.jobs.values()) % len(kinds)]
            spec = job_runs.spec(place, kind[0], kind[1] or None, max_steps=STEPS)
            spec.max_retries = 1000
            if kind not in whole:
                whole[kind] = read(services.now, _followed(services, spec, found.kills, dice, 0).id)
            job = _followed(services, spec, found.kills, dice, KILLS_PER_JOB)
            run = read(services.now, job.id) if job.state == job_pb2.JOB_STATE_SUCCEEDED else None
            if found.add(job, kind, run, whole[kind]) and arguments.keep:
                shutil.copytree(job.folder, arguments.keep / job.id, ignore_dangling_symlinks=True)
    print(json.dumps(found.results(), indent=2))


class Found:
    """What came of the kills so far. It is written after each job, so that a run that is ended counts too."""

    def __init__(self, seed: int, out: Path) -> None:
        self.kills: Counter[str] = Counter()
        self.jobs: Counter[str] = Counter()
        self._lost: list[str] = []
        self._wrong: list[str] = []
        self._anew = 0
        self._seed, self._out, self._begin = seed, out, time.monotonic()
        self._provenance = provenance()
        self._earlier = json.loads(out.read_text())["runs"] if out.exists() else []

    def add(self, job: job_pb2.Job, kind: tuple[str, str], run: Run | None, whole: Run) -> bool:
        """Count a job that has ended; `run` if it succeeded. True if it went wrong."""
        own_engine = not kind[1]
        self.jobs["own engine" if own_engine else "shared engine"] += 1
        differences: list[str] = []
        if run is None:
            self._lost.append(f"{job.id}, {kind}: {job.reason}")
        else:
            self._anew += run.account.lost
            if differences := _differences(run, whole, own_engine=own_engine):
                self._wrong.append(f"{job.id}, {kind}: {differences}")
        kills, wrong = sum(self.kills.values()), len(self._lost) + len(self._wrong)
        print(f"{kills} kills, {wrong} of {sum(self.jobs.values())} jobs wrong", flush=True)
        self._out.write_text(json.dumps({"runs": [*self._earlier, self.results()]}, indent=2) + "\n")
        return run is None or bool(differences)

    def results(self) -> dict[str, Any]:
        return self._provenance | {
            "kills": dict(self.kills) | {"all": sum(self.kills.values())},
            "jobs": dict(self.jobs)
            | {"all": sum(self.jobs.values()), "steps of each": STEPS, "algorithms": list(ALGORITHMS)},
            "steps done anew": self._anew,
            "jobs lost": self._lost,
            "mismatches": self._wrong,
            "seed": self._seed,
            "seconds": round(time.monotonic() - self._begin),
        }


def _followed(
    services: Services, spec: job_pb2.JobSpec, kills: Counter[str], dice: random.Random, count: int
) -> job_pb2.Job:
    """Run a job with `count` kills, as far as it is still there to be killed."""
    job_id, managed = services.now.submit(spec).id, spec.inference.HasField("managed")
    for _ in range(count):
        training, share = dice.random() < 0.9, dice.random()
        what = dice.choice([name for name in MODULES if managed or name != "engine"])
        while training and services.now.get(job_id).state not in (job_pb2.JOB_STATE_RUNNING, *_ENDED):
            time.sleep(0.05)
        time.sleep(share * (_TRAINING_S if training else _ANY_S))
        if services.now.get(job_id).state in _ENDED:
            break
        if len(pids := running(services.now, job_id, MODULES["training"])) > 1:
            raise AssertionError(f"{job_id} is trained by several processes: {pids}")
        if what == "service":
            services.kill()
            kills[what] += 1
        else:
            kills[what] += killed(services.now, job_id, MODULES[what])
    for event in services.now.watch(job_id, seconds=600):
        if event.HasField("state") and event.state.state in _ENDED:
            break
    return services.now.get(job_id)


def _differences(run: Run, whole: Run, *, own_engine: bool) -> list[str]:
    """What a job did otherwise than the one that was not killed. An engine that goes on has other versions."""
    apart = () if own_engine else ("tandem/weight_version",)
    found = run.account.faults()
    if run.sampled != whole.sampled:
        found.append("other rollouts")
    if run.figures_without(*apart) != whole.figures_without(*apart):
        found.append("other figures")
    if run.digest != whole.digest:
        found.append("other weights")
    if own_engine and not run.account.same(whole.account):
        found.append("other versions")
    return found


if __name__ == "__main__":
    main()
