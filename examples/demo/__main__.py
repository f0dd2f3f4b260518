"""Train a small real model by a job of the trainer service, watch it, and measure it. See `--help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from examples.demo import show
from examples.demo.run import Run, learn, workplace
from tandem.errors import TandemError
from tandem.processes import ChildError, Interrupted, Processes


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
    try:
        with workplace(options.out) as (processes, scratch):
            prepare(options.model, console, processes)
            run(options, console, processes, scratch)
    except Interrupted as signal:
        console.print(f"stopped by {signal}; nothing is left running")
        return 130
    except (ChildError, TandemError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        console.print(f"more is in {options.out}/*.log", highlight=False)
        return 1
    return 0


def run(options: argparse.Namespace, console: Console, processes: Processes, scratch: Path) -> None:
    """Have it learn, and write down what was seen."""
    wanted = Run(
        algorithm="grpo", model=options.model, steps=options.steps, seed=options.seed, out=options.out
    )
    learned = learn(wanted, processes, scratch, console)
    summary = (
        show.summarize(learned) | {"seed": options.seed, "model": options.model.name} | show.provenance()
    )
    show.write(options.out, learned, summary)
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


if __name__ == "__main__":
    sys.exit(main())
