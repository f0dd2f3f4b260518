"""`tandem submit`, `jobs`, `cancel`, `resume`, `delete`, `logs`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from tandem.cli.arguments import Parser, assignments, client, safe, say, with_services
from tandem.errors import invalid

if TYPE_CHECKING:
    from tandem.client import Job

_HEAD = ("JOB", "STATE", "ALGORITHM", "STEP", "AGE", "REASON")

#: What a check may take: its process loads TRL when the service starts, and it may ask the Hugging Face hub.
_CHECK_S = 150.0


def submit(argv: list[str]) -> int:
    """Submit a job file, and write the job's id."""
    parser = with_services(Parser("submit", "Submit a job; its id is written to standard output."), "trainer")
    parser.add_argument("file", help="the job, in TOML or JSON: docs/cli.md has an example")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="another value for a field of the file, such as training.max_steps=2; values may be JSON",
    )
    parser.add_argument("--check", action="store_true", help="only look whether the job would be taken")
    parser.add_argument(
        "--request-id", metavar="ID", help="submitting again under the same id makes no second job"
    )
    parser.add_argument("--watch", action="store_true", help="follow it, as tandem watch does")
    options = parser.parse_args(argv)
    from tandem.client import job_spec

    spec = job_spec(options.file, assignments(options.set, "set"))
    with client(options, timeout_s=_CHECK_S) as tandem:
        if options.check:
            tandem.check(spec)
            say("it would be taken")
            return 0
        job = tandem.submit(spec, request_id=options.request_id)
        say(job.id)
        if options.watch:
            from tandem.cli.watch import follow

            return follow(job)
    return 0


def list_jobs(argv: list[str]) -> int:
    """List jobs, the newest first."""
    parser = with_services(Parser("jobs", "List jobs, the newest first."), "trainer")
    parser.add_argument("--state", action="append", default=[], type=str.upper, help="only in this state")
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME=VALUE", help="only with this label"
    )
    parser.add_argument("--limit", type=int, default=50, help="at most this many (default 50)")
    parser.add_argument("--json", action="store_true", help="a JSON object in each line")
    options = parser.parse_args(argv)
    if options.limit < 1:
        parser.error("--limit must be at least 1")
    with client(options) as tandem:
        found = tandem.jobs(
            states=options.state, labels=_labels(options.label), page_size=min(options.limit, 1000)
        )
        rows = list(islice(found, options.limit))
    if options.json:
        for job in rows:
            say(json.dumps(_facts(job)))
        return 0
    table = [_HEAD, *(_row(job) for job in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
    for row in table:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def cancel(argv: list[str]) -> int:
    """Have jobs end."""
    parser = _on_jobs("cancel", "Have jobs end. What trains saves a checkpoint if it can.")
    parser.add_argument("--wait", action="store_true", help="until they have ended")
    options = parser.parse_args(argv)
    with client(options) as tandem:
        jobs = [tandem.job(name).cancel() for name in options.jobs]
        for job in jobs:
            if options.wait:
                for _ in job.watch(job.last_sequence):
                    pass
            say(f"{job.id} {job.state}")
    return 0


def resume(argv: list[str]) -> int:
    """Have jobs go on."""
    options = _on_jobs(
        "resume", "Have failed or cancelled jobs go on from their last checkpoint."
    ).parse_args(argv)
    with client(options) as tandem:
        for name in options.jobs:
            job = tandem.job(name).resume()
            say(f"{job.id} {job.state}")
    return 0


def delete(argv: list[str]) -> int:
    """Remove jobs."""
    parser = _on_jobs("delete", "End jobs, and remove all of them: folders, checkpoints, events.")
    options = parser.parse_args(argv)
    with client(options) as tandem:
        for name in options.jobs:
            tandem.job(name).delete()
            say(f"{name} deleted")
    return 0


def logs(argv: list[str]) -> int:
    """Write a job's log lines."""
    parser = with_services(Parser("logs", "Show what a job's processes wrote, so far."), "trainer")
    parser.add_argument("job", help="its id")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="and what they will write, until it is over"
    )
    options = parser.parse_args(argv)
    from tandem.cli.history import history
    from tandem.client import Log

    with client(options) as tandem:
        job = tandem.job(options.job)
        for line in job.watch(kinds=[Log]) if options.follow else history(job, Log):
            if isinstance(line, Log):
                say(safe(line.text, "\t"))
    return 0


def _on_jobs(command: str, description: str) -> Parser:
    parser = with_services(Parser(command, description), "trainer")
    parser.add_argument("jobs", nargs="+", metavar="job", help="their ids")
    return parser


def _labels(given: list[str]) -> dict[str, str]:
    labels = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise invalid("label", f"must be NAME=VALUE, is {text!r}")
        labels[name] = value
    return labels


def _facts(job: Job) -> dict[str, Any]:
    times = {name: getattr(job, name) for name in ("create_time", "start_time", "end_time")}
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "algorithm": job.algorithm,
        "step": job.step,
        "max_steps": job.max_steps,
        "attempt": job.attempt,
        "labels": dict(job.spec.labels),
        "folder": job.folder,
    } | {name: time.isoformat() if time else None for name, time in times.items()}


def _row(job: Job) -> tuple[str, ...]:
    age = (datetime.now(UTC) - job.create_time).total_seconds()
    steps = f"{job.step}/{job.max_steps or '?'}"
    width = 60 if sys.stdout.isatty() else 1000
    return job.id, job.state, job.algorithm, steps, short_time(age), safe(job.reason)[:width]


def short_time(seconds: float) -> str:
    """A length of time in its largest unit.

    >>> [short_time(s) for s in (0, 59, 61, 7200, 200_000)]
    ['0s', '59s', '1m', '2h', '2d']
    """
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"
