"""Every algorithm learns the demo's task: SmolLM2-135M-Instruct, sums and differences, scored on some held out.

python -m examples.learning [--algorithms grpo xpo ...]

One after the other, each as a job that its file in examples/jobs describes. Figures go to docs/learning.json, the
curves to docs/learning.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.run import Run, learn, workplace
from examples.demo.show import provenance

ALGORITHMS = ("grpo", "rloo", "online_dpo", "nash_md", "xpo")
RESULTS = Path("docs/learning.json")
PLOT = Path("docs/learning.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.learning", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/learning"), help="where logs go")
    options = parser.parse_args()
    console = Console()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for algorithm in options.algorithms:
        console.print(algorithm, style="bold")
        out = options.out / algorithm
        run = Run(algorithm=algorithm, model=options.model, steps=options.steps, seed=options.seed, out=out)
        with workplace(out) as (processes, scratch):
            learned = learn(run, processes, scratch, console)
        results[algorithm] = {
            "before": learned.before,
            "after": learned.after,
            "seconds": learned.seconds,
            "rewards": [reward for _, reward in learned.rewards],
        } | provenance()
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    plot(results)


def plot(results: dict[str, Any]) -> None:
    """The curves, each the mean over three steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for algorithm in (name for name in ALGORITHMS if name in results):
        rewards, found = results[algorithm]["rewards"], results[algorithm]
        smooth = [statistics.mean(rewards[max(0, i - 1) : i + 2]) for i in range(len(rewards))]
        label = f"{algorithm}: held out {found['before']:.2f} to {found['after']:.2f}"
        axes.plot(range(1, len(smooth) + 1), smooth, label=label)
    axes.set(xlabel="optimizer step", ylabel="reward", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.savefig(PLOT, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
