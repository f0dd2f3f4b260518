"""What the demo shows: a line for each step while it runs; a plot and a summary when it is done."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Step = dict[str, Any]
WIDTH = 20
HEAD = f"step  reward  {'':{WIDTH}}  tokens/s  sync ms  moved MB  weight version"


class Steps:
    """A table that grows by a line for each step, over a bar that tells how far it is."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._task = self._progress.add_task("training", total=total)

    def __enter__(self) -> Steps:
        self._progress.console.print(HEAD, style="bold", highlight=False)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def add(self, step: Step) -> None:
        """Show a step."""
        full = round(step["reward"] * WIDTH)
        bar = f"[green]{'█' * full}[/][dim]{'░' * (WIDTH - full)}[/]"
        sync = sum(update["ms"] for update in step["updates"])
        moved = sum(update["bytes"] for update in step["updates"])
        self._progress.console.print(
            f"{step['step']:>4}  {step['reward']:>6.3f}  {bar}  {step['tokens_per_second']:>8.0f}"
            f"  {sync:>7.1f}  {moved / 1e6:>8.1f}  {step['weight_version']:>14}",
            highlight=False,
        )
        self._progress.update(self._task, completed=step["step"])


def summarize(steps: Sequence[Step], before: float, after: float, seconds: float) -> dict[str, Any]:
    """The run's figures. The first update, which brings the trainer's weights to the engine, counts apart."""
    first, *updates = [update for step in steps for update in step["updates"]]
    return {
        "reward_before": round(before, 4),
        "reward_after": round(after, 4),
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "sync_ms_p50": round(statistics.median(update["ms"] for update in updates), 3),
        "bytes_moved_per_sync": int(statistics.median(update["bytes"] for update in updates)),
        "transport": steps[-1]["transport"],
        "aliased": steps[-1]["aliased"],
        "bytes_moved_first": first["bytes"],
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in steps)),
        "weight_version": steps[-1]["weight_version"],
    }


def write(folder: Path, steps: Sequence[Step], summary: dict[str, Any]) -> None:
    """Write summary.json and reward.png to `folder`."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    from matplotlib.figure import Figure  # a second to import, and without a window

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        title=f"{summary['model']} learns sums and differences",
        xlabel="step",
        ylabel="reward",
        ylim=(0, 1.05),
    )
    axes.plot(
        [step["step"] for step in steps],
        [step["reward"] for step in steps],
        label="rollouts, sampled",
        marker=".",
    )
    held_out = [summary["reward_before"], summary["reward_after"]]
    axes.plot([0, len(steps)], held_out, label="held-out tasks, greedy", linestyle="", marker="D")
    for step, reward in zip([0, len(steps)], held_out, strict=True):
        axes.annotate(f"{reward:.2f}", (step, reward), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(folder / "reward.png", dpi=150)
