"""`tandem watch`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tandem.cli.arguments import Parser, client, say, with_services

if TYPE_CHECKING:
    from tandem.client import Event, Job


def main(argv: list[str]) -> int:
    """Follow a job until it is over. Returns 0 if it succeeded, else 1."""
    parser = with_services(
        Parser("watch", "Follow a job until it is over. The exit code is 0 if it succeeded."), "trainer"
    )
    parser.add_argument("job", help="its id")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only events after this number")
    parser.add_argument("--plain", action="store_true", help="a line for each event, as where no terminal is")
    options = parser.parse_args(argv)
    with client(options) as tandem:
        return follow(tandem.job(options.job), after=options.after, lines=options.plain)


def follow(job: Job, *, after: int = 0, lines: bool = False) -> int:
    """Show a job's events until it is over. Returns the exit code."""
    from tandem.client import JobState

    show(job, job.watch(after), lines=lines)
    return 0 if job.state is JobState.SUCCEEDED else 1


def show(job: Job, events: Iterable[Event], *, lines: bool = False) -> None:
    """Show a job's events as they come: on a board where a terminal is, else by `lines`."""
    from tandem.cli.board import plain

    if lines or not sys.stdout.isatty():
        for event in events:
            if line := plain(event):
                say(line)
    else:
        _draw(job, events)


def _draw(job: Job, events: Iterable[Event]) -> None:
    from rich.live import Live

    from tandem.cli.board import Board

    board = Board(job)
    with Live(board, refresh_per_second=8) as live:
        for event in events:
            board.add(event)
        live.refresh()
