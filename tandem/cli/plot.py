"""`tandem plot`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli.arguments import Parser, client, say, with_services
from tandem.errors import invalid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tandem.client import Metrics

Curves = dict[str, list[tuple[int, float]]]
#: What is drawn if nothing is named, where the job has it.
_USUAL = ("loss", "completions/mean_length", "kl", "tandem/tokens_per_second", "tandem/sync_ms")


def main(argv: list[str]) -> int:
    """Write a PNG with a job's curves."""
    parser = with_services(Parser("plot", "Draw a job's curves to a PNG."), "trainer")
    parser.add_argument("job", help="its id")
    parser.add_argument("--out", type=Path, help="the file (default JOB.png)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="what to draw, by TRL's names; several may be",
    )
    options = parser.parse_args(argv)
    import matplotlib  # noqa: F401  # told of before anything is fetched

    from tandem.cli.history import history
    from tandem.client import Metrics

    with client(options) as tandem:
        job = tandem.job(options.job)
        curves = gather(history(job, Metrics))
    names = chosen(curves, options.metric)
    out = options.out or Path(f"{options.job}.png")
    try:
        draw(curves, names, f"{job.id}  {job.algorithm}  {job.state}", out)
    except OSError as error:
        raise invalid("out", f"cannot write {out}: {error.strerror}") from error
    say(str(out))
    return 0


def gather(events: Iterable[Metrics]) -> Curves:
    """The points of each figure. Steps that were done again after a checkpoint replace what they were before."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for event in events:
        for name, value in event.values.items():
            found[name][event.step] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def chosen(curves: Curves, wanted: list[str]) -> list[str]:
    """The figures to draw.

    Raises:
        InvalidArgument: the job has none, or not the one that is named.
    """
    from tandem.cli.board import REWARDS

    if not curves:
        raise invalid("job", "has no metrics yet")
    for name in wanted:
        if name not in curves:
            raise invalid("metric", f"the job has no {name!r}; it has {', '.join(sorted(curves))}")
    if wanted:
        return wanted
    reward = [name for name in REWARDS if name in curves][:1]
    usual = [*reward, *(name for name in _USUAL if name in curves)]
    return usual or sorted(curves)[:6]


def draw(curves: Curves, names: list[str], title: str, out: Path) -> None:
    """Write the file: a panel for each figure."""
    panels(curves, names, title).savefig(out, dpi=120, format="png")


def panels(curves: Curves, names: list[str], title: str) -> Figure:
    """A panel for each figure, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 2 * len(names)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for name, (axes,) in zip(names, rows, strict=True):
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, marker="." if len(steps) < 50 else "")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    rows[-1][0].set_xlabel("step")
    return figure
