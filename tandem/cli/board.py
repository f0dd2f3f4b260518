"""What a watch shows: the job's events summed up, as plain lines or as a board that is drawn anew."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tandem.cli.arguments import safe
from tandem.client import CheckpointSaved, Event, Job, JobState, Log, Metrics, Sample, Samples, StateChange

if TYPE_CHECKING:
    from rich.console import RenderableType

#: The figure that rises as the policy learns, by the names of the algorithms.
REWARDS = ("reward", "objective/scores", "objective/model_scores", "rewards/chosen")
#: Other figures that are shown where a job has them: name, what to call it, format.
FIGURES = (
    ("tandem/tokens_per_second", "tokens/s", "{:.0f}"),
    ("tandem/sync_ms", "sync ms", "{:.1f}"),
    ("tandem/gpu_memory_gib", "GPU GiB", "{:.1f}"),
    ("tandem/weight_version", "weight version", "{:.0f}"),
)
_BARS = "▁▂▃▄▅▆▇█"
_KEPT = 1000  # figures of each curve: enough for any width


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as bars, the lowest to the highest; blank where a value is no number.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    >>> sparkline([1, float("nan"), 1])
    '▄ ▄'
    """
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    low, span = min(finite), max(finite) - min(finite)
    text = ""
    for value in shown:
        share = (value - low) / span if span else 0.5
        text += _BARS[min(int(share * 8), 7) if span else 3] if math.isfinite(value) else " "
    return text


def reward_of(metrics: Metrics) -> float | None:
    """The reward among a step's figures, by whatever name."""
    return next((metrics.values[name] for name in REWARDS if name in metrics.values), None)


def plain(event: Event) -> str:
    """The event in lines, mostly one."""
    return "\n".join(f"{event.time:%Y-%m-%dT%H:%M:%SZ} {line}" for line in _told(event))


def _told(event: Event) -> list[str]:
    match event:
        case StateChange():
            return [f"{event.state}{f': {safe(event.reason)}' if event.reason else ''}"]
        case Metrics():
            return [" ".join([f"step {event.step}/{event.max_steps or '?'}", *_figures(event)])]
        case Samples():
            return [f"sample {_sample(sample)}" for sample in event.samples]
        case Log():
            return [f"log {safe(event.text, chr(9))}"]
        case CheckpointSaved():
            return [f"checkpoint {event.checkpoint.path} ({event.checkpoint.bytes / 1e6:.1f} MB)"]
    return ["an event that this client does not know"]


def _figures(metrics: Metrics) -> list[str]:
    reward, loss = reward_of(metrics), metrics.values.get("loss")
    found = [f"reward {reward:.4g}"] if reward is not None else []
    found += [f"loss {loss:.4g}"] if loss is not None else []
    return found + [
        f"{label} {form.format(metrics.values[name])}"
        for name, label, form in FIGURES
        if name in metrics.values
    ]


def _sample(sample: Sample, limit: int = 200) -> str:
    rewards = [f"{safe(name)}={value:.3g}" for name, value in sorted(sample.rewards.items())]
    head = f"[{' '.join([*rewards, f'version={sample.weight_version}'])}]"
    return f"{head} {_cut(sample.prompt, limit)} -> {_cut(sample.completion, limit)}"


def _cut(text: str, limit: int) -> str:
    shown = safe(text)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


class Board:
    """A job as it is after the events so far."""

    def __init__(self, job: Job) -> None:
        self.id, self.algorithm = job.id, job.algorithm
        self.state, self.reason = job.state, job.reason
        self.step, self.max_steps, self.attempt = 0, 0, job.attempt
        self.rewards: deque[float] = deque(maxlen=_KEPT)
        self.losses: deque[float] = deque(maxlen=_KEPT)
        self.figures: dict[str, float] = {}
        self.sample: Sample | None = None
        self.log = ""
        self.checkpoint = ""

    def add(self, event: Event) -> None:
        """Take an event into account."""
        match event:
            case StateChange():
                self.state, self.reason, self.attempt = event.state, event.reason, event.attempt
            case Metrics():
                self.step, self.max_steps = event.step, event.max_steps
                self.figures |= event.values
                for curve, value in (
                    (self.rewards, reward_of(event)),
                    (self.losses, event.values.get("loss")),
                ):
                    if value is not None:
                        curve.append(value)
            case Samples() if event.samples:
                self.sample = event.samples[-1]
            case Log():
                self.log = event.text
            case CheckpointSaved():
                self.checkpoint = event.checkpoint.path

    def __rich__(self) -> RenderableType:
        """The board, for rich."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        colour = {JobState.SUCCEEDED: "green", JobState.FAILED: "red", JobState.CANCELLED: "yellow"}
        head = Text.assemble(
            (f"{self.id} ", "bold"), f"{self.algorithm} ", (self.state.value, colour.get(self.state, "cyan"))
        )
        head.append(f"  attempt {self.attempt}" if self.attempt > 1 else "")
        head.append(f"  {safe(self.reason)}" if self.reason else "", "dim")
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.max_steps or None, completed=self.step, width=40)
        grid.add_row("step", bar, f"{self.step}/{self.max_steps or '?'}")
        for label, curve in (("reward", self.rewards), ("loss", self.losses)):
            if curve:
                grid.add_row(label, Text(sparkline(curve), "green"), f"{curve[-1]:.4g}")
        parts: list[RenderableType] = [head, grid]
        shown = [
            f"{label} {form.format(self.figures[name])}"
            for name, label, form in FIGURES
            if name in self.figures
        ]
        parts += [Text("   ".join(shown))] if shown else []
        parts += [Text(_sample(self.sample, 300), "dim")] if self.sample else []
        parts += [Text(f"checkpoint {self.checkpoint}", "dim")] if self.checkpoint else []
        if self.log and not self.figures:  # while it loads; later there is more to tell
            parts.append(Text(safe(self.log), "dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)
