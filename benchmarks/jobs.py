"""How long jobs take to start, to be listed and to be watched: figures to benchmarks/results/jobs.json.

python -m benchmarks.jobs [--part list|start|watch]... [--jobs N] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import percentiles, provenance
from tandem.rpc import connect_aio
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tandem.trainer.v1.trainer_pb2_grpc import TrainingJobServiceStub
from tests import models
from tests.job_service import JobService, Place, end_jobs, job_service
from tests.services import inference_service
from trainer_service.jobs.states import Move
from trainer_service.jobs.store import open_store

PARTS = ["list", "start", "watch"]
LISTED = 1000
WATCHERS = 100
WATCHED_STEPS = 60
#: Processes that wait for work have used no CPU for so long.
_IDLE_S = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="measure this alone, and keep the others"
    )
    parser.add_argument("--jobs", type=int, default=10, help="to start with a standby process, and without")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/jobs.json"))
    arguments = parser.parse_args()
    parts = arguments.part or PARTS
    results = json.loads(arguments.out.read_text()) if arguments.part and arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="tdb") as name:
        folder = Path(name)
        place = Place(folder / "place", models.make(folder / "llama", "llama"))
        if "list" in parts:
            results["list"] = provenance() | listing(folder / "l", place)
        if parts != ["list"]:
            with inference_service(place.model, folder / "i") as engine:
                if "start" in parts:
                    results["start"] = provenance() | {
                        "standby": starts(folder / "s", place, engine.address, arguments.jobs, 1),
                        "no standby": starts(folder / "c", place, engine.address, arguments.jobs, 0),
                    }
                if "watch" in parts:
                    results["watch"] = provenance() | watching(folder / "w", place, engine.address)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def listing(folder: Path, place: Place) -> dict[str, Any]:
    """ListJobs of one page with all jobs, over gRPC."""
    folder.mkdir()
    from trainer_service.messages import spec_of

    spec = spec_of(place.spec("unix:///nowhere.sock", labels={"kind": "listed"}))
    store = open_store("", folder)
    store.lock()
    for number in range(LISTED):
        store.create(f"job-{number:012x}", spec)
        store.move(f"job-{number:012x}", Move.CANCEL)
    store.close()
    took = []
    load = os.getloadavg()[0]
    with job_service(folder, place, "--standby=0") as service:
        _wait_until_idle(service)
        for _ in range(51):
            started = time.perf_counter()
            found = service.stub.ListJobs(pb.ListJobsRequest(page_size=LISTED), timeout=60)
            took.append(1e3 * (time.perf_counter() - started))
            if len(found.jobs) != LISTED:
                raise AssertionError(f"{len(found.jobs)} jobs")
    size = found.ByteSize()
    return {
        "load_average": load,
        "jobs": LISTED,
        "bytes": size,
        "first_ms": took[0],
        "ms": percentiles(took[1:]),
    }


def starts(folder: Path, place: Place, engine: str, count: int, standby: int) -> dict[str, Any]:
    """Seconds from the call that submits a job of one step, on an idle machine, to each of its states."""
    folder.mkdir()
    load = os.getloadavg()[0]
    phases: dict[str, list[float]] = {"submitted": [], "STARTING": [], "RUNNING": [], "SUCCEEDED": []}
    with job_service(folder, place, f"--standby={standby}") as service:
        for _ in range(count):
            _wait_until_idle(service)
            memory = _standby_memory(service)
            started = time.time()
            job = service.submit(place.spec(engine, steps=1))
            phases["submitted"].append(time.time() - started)
            for event in service.watch(job.id):
                name = job_pb2.JobState.Name(event.state.state).removeprefix("JOB_STATE_")
                if name in phases:
                    phases[name].append(time.time() - started)
                if name == "FAILED":
                    raise AssertionError(event.state.reason)
        end_jobs(folder)
    seconds = {name: percentiles(took) for name, took in phases.items()}
    return {"load_average": load, "seconds": seconds, "standby_memory_mib": memory}


def watching(folder: Path, place: Place, engine: str) -> dict[str, Any]:
    """A job of some steps with nobody else watching, and one with many who do."""
    folder.mkdir()
    training = {"max_steps": WATCHED_STEPS, "save_steps": 0, "per_device_train_batch_size": 8}
    training |= {"max_completion_length": 64, "gradient_checkpointing": False}
    found: dict[str, Any] = {"load_average": os.getloadavg()[0], "watchers": WATCHERS}
    with job_service(folder, place, "--standby=0") as service:
        found["one watcher"] = _steps(service, place.spec(engine, training=training))
        context = multiprocessing.get_context("spawn")
        reading, writing = context.Pipe(duplex=False)

        def watched(job_id: str) -> None:
            context.Process(target=_watchers, args=(service.address, job_id, writing)).start()

        found["all"] = _steps(service, place.spec(engine, training=training), watched)
        found |= reading.recv()
        end_jobs(folder)
    return found


def _steps(
    service: JobService, spec: job_pb2.JobSpec, submitted: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """What a step takes, and what the training's and the service's processes use for each."""
    job = service.submit(spec)
    submitted(job.id)
    own = psutil.Process(service.process.pid)
    training: psutil.Process | None = None
    times: list[float] = []
    used: list[tuple[float, float]] = []
    for event in service.watch(job.id):
        if "reward" not in event.metrics.values:
            continue
        training = training or psutil.Process(service.training(job.id))
        times.append(event.time.ToNanoseconds() / 1e6)
        if event.metrics.step < WATCHED_STEPS - 10:  # it is not ending yet
            used.append((_cpu_ms(training), _cpu_ms(own)))
    if event.state.state != job_pb2.JOB_STATE_SUCCEEDED:
        raise AssertionError(f"the job ended so: {event}")
    (training_first, own_first), (training_last, own_last), steps = used[0], used[-1], len(used) - 1
    return {
        "step_ms": percentiles([b - a for a, b in itertools.pairwise(times)]),
        "training_cpu_ms_per_step": round((training_last - training_first) / steps, 1),
        "service_cpu_ms_per_step": round((own_last - own_first) / steps, 1),
        "service_rss_mib": _mib(own.memory_info().rss),
    }


def _cpu_ms(process: psutil.Process) -> float:
    times = process.cpu_times()
    return 1e3 * (times.user + times.system)


def _watchers(address: str, job_id: str, result: Any) -> None:
    """In a process of their own: all watch one job to its end."""

    async def watch(stub: Any) -> tuple[list[int], list[float]]:
        sequences, late = [], []
        async for response in stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=600):
            now = time.time()
            for event in response.events:
                sequences.append(event.sequence)
                if event.HasField("metrics"):  # its time is when the training wrote it
                    late.append(1e3 * (now - event.time.ToNanoseconds() / 1e9))
        return sequences, late

    async def every() -> dict[str, Any]:
        async with connect_aio(address) as channel:
            stub = TrainingJobServiceStub(channel)  # type: ignore[no-untyped-call]
            found = await asyncio.gather(*(watch(stub) for _ in range(WATCHERS)))
        count = len(found[0][0])
        in_order = all(sequences == list(range(1, count + 1)) for sequences, _ in found)
        # The first ones came late, as the watchers did.
        late = [ms for _, one in found for ms in one[5:]]
        return {"events": count, "all_in_order": in_order, "writing_to_arrival_ms": percentiles(late)}

    result.send(asyncio.run(every()))


def _wait_until_idle(service: JobService) -> None:
    """Until the service and all that it keeps ready have loaded what they load."""
    since, last = time.monotonic(), -1.0
    while time.monotonic() - since < _IDLE_S:
        now = sum(
            sum(p.cpu_times()[:2]) for p in psutil.Process(service.process.pid).children(recursive=True)
        )
        if abs(now - last) > 0.05:
            since, last = time.monotonic(), now
        time.sleep(0.1)


def _standby_memory(service: JobService) -> dict[str, float]:
    """Of all processes that stand by: resident, and what nobody else has."""
    found = [psutil.Process(pid).memory_full_info() for pid in service.standbys()]
    return {"rss": _mib(sum(one.rss for one in found)), "unique": _mib(sum(one.uss for one in found))}


def _mib(count: float) -> float:
    return round(count / 2**20, 1)


if __name__ == "__main__":
    main()
