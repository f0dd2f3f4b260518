"""A job over both services, from its file to its score: what the demo shows, and what algorithms are compared by."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console

from examples.demo.tasks import MAX_TOKENS, Tasks, score
from tandem.cli.board import REWARDS
from tandem.cli.pair import Pair
from tandem.cli.plot import Curves, gather
from tandem.cli.watch import show
from tandem.client import Event, Job, Log, Metrics, Samples, StateChange, TandemClient, job_spec
from tandem.errors import TandemError
from tandem.processes import Processes
from tandem.trainer.v1.job_pb2 import JobSpec
from trainer_service.jobs import processes as jobs

#: What all processes get. They take turns on the same cores.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits must not keep the other process's from its core
    # Freed memory is kept (glibc): getting it back from the system page by page costs a third of the step.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than it saves here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
FILES = Path(__file__).parents[1] / "jobs"
START_S = 180.0
#: The first submission waits until the service has TRL loaded, which checks the job.
CALL_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to do."""

    algorithm: str
    model: Path
    steps: int
    seed: int
    out: Path
    """Where logs and tasks go."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What became of it."""

    before: float
    """The mean reward of greedy answers to the tasks held out."""
    after: float
    began_with: int
    """The weight version before the first step."""
    rewards: list[tuple[int, float]]
    """Step, and what its rollouts earned: the mean, without the job's weight."""
    curves: Curves
    """The job's figures by TRL's names."""
    seconds: float
    """From nothing to the last score."""


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[tuple[Processes, Path]]:
    """Starts processes, with their logs in `out`, and has a folder for sockets and jobs. Of all three nothing stays."""
    out.mkdir(parents=True, exist_ok=True)
    # Only ours, and short wherever `out` is: a socket's path has a limit, and jobs have sockets too.
    scratch = Path(tempfile.mkdtemp(prefix="tandem-demo-"))
    try:
        with Processes(out, ENVIRONMENT | {"TMPDIR": str(scratch)}) as processes:
            yield processes, scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def learn(run: Run, processes: Processes, scratch: Path, console: Console) -> Learned:
    """Start both services, score, train, and score again. Everything but the services has ended when this returns.

    Raises:
        Interrupted: somebody wants this program to end.
        ChildError: a service has ended.
        TandemError: the job failed, or a service did not do what it was asked for.
    """
    started = time.monotonic()
    tasks, table = Tasks(run.seed), tomllib.loads((FILES / f"{run.algorithm}.toml").read_text())
    addresses = {name: f"unix://{scratch}/{name}.sock" for name in ("inference", "trainer")}
    with TandemClient(**addresses, timeout_s=CALL_S, patience_s=0.0) as client:
        with console.status("the services start, and one loads the model"):
            pair = Pair(
                processes,
                addresses,
                inference=_inference(run, table),
                trainer={"folder": scratch / "jobs"},
            )
            pair.wait_until_serving(START_S)
        before, began_with = scored(client, tasks)
        console.print(f"before: {before:.3f} on {len(tasks.held_out)} held-out tasks, answered greedily")
        with _submitted(client, _job(run, table, tasks, addresses["inference"])) as job:
            metrics: list[Metrics] = []
            kinds = [StateChange, Metrics, Log, *([Samples] if sys.stdout.isatty() else [])]
            show(job, _noted(_watched(job, kinds, pair), metrics, run.out / "job.log"))
            job.result(CALL_S)  # raises where it failed
        after, _ = scored(client, tasks)
        console.print(f"after:  {after:.3f}")
    curves, weight = gather(metrics), table["rewards"][0].get("weight", 1.0)
    rewards = next(curves[name] for name in REWARDS if name in curves)
    return Learned(
        before=before,
        after=after,
        began_with=began_with,
        rewards=[(step, reward / weight) for step, reward in rewards],
        curves=curves,
        seconds=time.monotonic() - started,
    )


def scored(client: TandemClient, tasks: Tasks) -> tuple[float, int]:
    """The mean reward of greedy answers to the tasks held out, and the weight version that gave them."""
    chats = [task.chat for task in tasks.held_out]
    answers = client.generate(chats, temperature=0.0, max_tokens=MAX_TOKENS)
    rewards = [score(answer.text, task.answer) for answer, task in zip(answers, tasks.held_out, strict=True)]
    return statistics.mean(rewards), answers[0].weight_versions[-1][0]


def _inference(run: Run, table: dict[str, Any]) -> dict[str, Any]:
    """Flags of the inference service. Its engine is the one that the job's file asks for."""
    engine = table["inference"]["managed"]["engine"] | {"seed": run.seed}
    return {
        "model": run.model,
        "reference_model": run.model if run.algorithm in ("nash_md", "xpo") else None,
        "engine": [f"{name}={value}" for name, value in engine.items()],
    }


def _job(run: Run, table: dict[str, Any], tasks: Tasks, inference: str) -> JobSpec:
    """The algorithm's job file, on these tasks and this service."""
    lines = run.out.resolve() / "tasks.jsonl"
    tasks.write(lines)
    weight = table["rewards"][0].get("weight", 1.0)
    changes: dict[str, Any] = {
        "model.path": str(run.model.resolve()),
        "dataset": {"json_lines": str(lines)},
        "rewards": [{"function": "examples.demo.tasks:reward", "weight": weight}],
        "inference.service.addresses": [inference],
        "training.max_steps": run.steps,
        "training.seed": run.seed,
        f"{run.algorithm}.trl_options.save_only_model": True,  # nobody will resume it
    }
    return job_spec(table, changes)


@contextlib.contextmanager
def _submitted(client: TandemClient, spec: JobSpec) -> Iterator[Job]:
    """A job that is over, and has left nothing, when the context is left."""
    job = client.submit(spec)
    try:
        yield job
    finally:
        try:
            job.delete()
        except TandemError:  # its service has died, which jobs outlive
            jobs.kill(Path(job.folder), None)


def _watched(job: Job, kinds: list[type[Event]], pair: Pair) -> Iterator[Event]:
    """The job's events until it is over, while signals and the services are looked after.

    Raises:
        Interrupted, ChildError: as `Pair.wait`.
        TandemError: as `Job.watch`.
    """
    found: SimpleQueue[Event | BaseException | None] = SimpleQueue()

    def watch() -> None:
        try:
            for event in job.watch(kinds=kinds):
                found.put(event)
            found.put(None)
        except BaseException as error:  # noqa: BLE001  # raised again below
            found.put(error)

    threading.Thread(target=watch, daemon=True).start()
    while True:
        pair.wait()
        while not found.empty():
            match found.get():
                case None:
                    return
                case BaseException() as error:
                    raise error
                case event:
                    yield event


def _noted(events: Iterator[Event], metrics: list[Metrics], log: Path) -> Iterator[Event]:
    """Those of the events that are shown. What the job writes goes to a file: its own folder will be gone."""
    with log.open("w") as file:
        for event in events:
            if isinstance(event, Log):
                file.write(f"{event.text}\n")
                continue
            if isinstance(event, Metrics):
                metrics.append(event)
            yield event
