"""The `tandem` command. A subcommand is a function that takes the arguments after its name and returns an exit code:
the client's are modules of this package, the services' are entry points of the group `tandem.commands`. Only the one
that is called is imported.

Exit codes: 0 done, 1 failed, 2 wrong arguments or configuration, 3 service not available, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, version

from tandem.errors import InvalidArgument, TandemError, Unavailable

Command = Callable[[list[str]], int | None]

GROUP = "tandem.commands"
#: The client's commands: the function in this package that each is, and what it does.
OWN = {
    "up": ("up:main", "run both services here, until Ctrl-C"),
    "submit": ("jobs:submit", "submit a job file"),
    "jobs": ("jobs:list_jobs", "list jobs"),
    "watch": ("watch:main", "follow a job"),
    "cancel": ("jobs:cancel", "have jobs end"),
    "resume": ("jobs:resume", "have failed or cancelled jobs go on"),
    "delete": ("jobs:delete", "remove jobs and all they have"),
    "logs": ("jobs:logs", "show what a job's processes wrote"),
    "plot": ("plot:main", "draw a job's curves"),
    "dashboard": ("dashboard:main", "serve a web page of jobs and engines"),
    "generate": ("generate:main", "sample from the policy"),
    "doctor": ("doctor:main", "look at this host, and say what to mend"),
}
_SERVICES = {"inference": "serve a model", "trainer": "serve training jobs"}

_debug = False  # whether errors show their tracebacks

_USAGE = "usage: tandem [--debug] COMMAND [ARGUMENTS...]"
_OPTIONS = """options:
  -h, --help  show this, or after a command, that command's help
  --version   show the version
  --debug     show tracebacks of errors"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after `tandem`; the process's own if None.

    Returns:
        The exit code.
    """
    global _debug
    arguments = list(sys.argv[1:] if argv is None else argv)
    _debug = False
    while arguments and arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("-h", "--help"):
            return _say(_help())
        if option == "--version":
            return _say(f"tandem {_version()}")
        if option != "--debug":
            return _fail(f"there is no option {option}\n{_USAGE}", 2)
        _debug = True
    if not arguments:
        return _fail(_help(), 2, prefix="")
    name, *rest = arguments
    commands = _commands()
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; tandem --help lists the commands"
        return _fail(f"there is no command {name}{hint}", 2)
    return run(name, commands[name], rest)


def explain(error: Exception, command: str) -> int:
    """Say on standard error why a command failed. For commands that end the process themselves.

    Returns:
        The exit code.
    """
    if _debug:
        traceback.print_exception(error)
    match error:
        case TandemError():
            code = 2 if isinstance(error, InvalidArgument) else 3 if isinstance(error, Unavailable) else 1
            return _fail(str(error), code)
        case ModuleNotFoundError():
            return _fail(f"{command} needs {error.name}, which is not installed here", 1)
    lines = str(error).strip().splitlines() or ["no message"]
    return _fail(f"{type(error).__name__}: {lines[0]}{' ...' if lines[1:] else ''} (--debug shows all)", 1)


def run(name: str, load: Callable[[], Command], arguments: list[str]) -> int:
    """Load a command and call it, for modules that are run by themselves: they need not be installed.

    Returns:
        The exit code.
    """
    try:
        return int(load()(arguments) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has left
        sys.stdout = None  # or the interpreter flushes it at exit and fails again
        return 1
    except Exception as error:  # noqa: BLE001  # of whatever the command runs
        return explain(error, name)


def _commands() -> dict[str, Callable[[], Command]]:
    """What loads each command."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return {point.name: point.load for point in points} | {name: partial(_own, name) for name in OWN}


def _own(name: str) -> Command:
    module, _, function = OWN[name][0].partition(":")
    command: Command = getattr(importlib.import_module(f"tandem.cli.{module}"), function)
    return command


def _version() -> str:
    try:
        return version("tandem")
    except PackageNotFoundError:
        return "(not installed)"


def _help() -> str:
    told = _SERVICES | {name: text for name, (_, text) in OWN.items()}
    names = sorted(_commands(), key=lambda name: list(told).index(name) if name in told else len(told))
    lines = [f"  {name:<10} {told.get(name, '')}".rstrip() for name in names]
    return "\n".join([_USAGE, "", "commands:", *lines, "", _OPTIONS])


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return 0


def _fail(text: str, code: int, prefix: str = "tandem: ") -> int:
    sys.stderr.write(f"{prefix}{text}\n")
    return code
