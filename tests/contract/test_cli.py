"""`tandem`: subcommands of whoever is installed, errors in one line, exit codes that scripts can trust."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.cli import OWN

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"

Run = Callable[..., "subprocess.CompletedProcess[str]"]

COMMANDS = """
import os, signal, sys
from tandem.errors import InvalidArgument, Reason, Unavailable, Violation

def echo(arguments):
    print(*arguments)
    return len(arguments)

def quiet(arguments):
    pass

def many(arguments):
    for number in range(100000):
        print(number)

def invalid(arguments):
    raise InvalidArgument(Reason.FIELD_INVALID, "two are wrong", violations=[Violation("a", "b")])

def gone(arguments):
    raise Unavailable(Reason.UNREACHABLE, "nobody there")

def bug(arguments):
    raise ValueError("first line\\nsecond line")

def interrupt(arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
    os.kill(os.getpid(), signal.SIGINT)

def missing(arguments):
    import not_installed_at_all
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `tandem` with one more distribution installed, whose commands are those above."""
    names = ["echo", "quiet", "many", "invalid", "gone", "bug", "interrupt", "missing"]
    info = tmp_path / "fake-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
    points = "\n".join(f"{name} = fake_commands:{name}" for name in names)
    (info / "entry_points.txt").write_text(f"[tandem.commands]\n{points}\nbroken = no_such_module:main\n")
    (tmp_path / "fake_commands.py").write_text(textwrap.dedent(COMMANDS))

    def tandem(*arguments: str, pipe: str = "") -> subprocess.CompletedProcess[str]:
        env = dict(os.environ, PYTHONPATH=str(tmp_path))
        command = [sys.executable, "-m", "tandem.cli", *arguments]
        if pipe:
            command = ["/bin/bash", "-o", "pipefail", "-c", f'"$@" {pipe}', "bash", *command]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)

    return tandem


def test_help_lists_the_commands_without_importing_them(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert {"echo", "broken", "submit", "watch", "doctor"} <= set(done.stdout.split())
    assert done.stderr == ""


@pytest.mark.parametrize("name", OWN)
def test_each_command_explains_itself_and_loads_nothing_heavy(name: str) -> None:
    """Neither what computes nor, before it is needed, what draws."""
    script = f"""
import sys
from tandem.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as ended:
    assert ended.code == 0
heavy = {{"torch", "vllm", "trl", "transformers", "numpy", "matplotlib", "rich", "aiohttp"}}
print(heavy & {{module.partition(".")[0] for module in sys.modules}} or "light")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: tandem {name}")
    assert done.stdout.splitlines()[-1] == "light"


@pytest.mark.parametrize("name", ["", *OWN])
def test_help_answers_at_once(name: str) -> None:
    """In less than 200 ms of the processor, or of a processor that is slower now, in what 16 bare Pythons take.

    Caches may be cold at first.
    """
    bare, took, most = [], [], 0.2
    while len(took) < 5 and min(took, default=most) >= most:
        bare.append(processor_seconds("-c", "pass"))
        took.append(processor_seconds("-m", "tandem.cli", *filter(None, [name]), "--help"))
        most = max(0.2, 16 * min(bare))
    assert min(took) < most, f"tandem {name} --help: {took}, a bare Python: {bare}"


def processor_seconds(*arguments: str) -> float:
    """Of a Python that is run with these."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_every_command_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)", DOCS.read_text(), re.M))
    assert documented == {*OWN, "inference", "trainer"}


def test_arguments_pass_through_untouched(run: Run) -> None:
    done = run("echo", "--help", "-x", "--debug", "a b")
    assert (done.returncode, done.stdout, done.stderr) == (4, "--help -x --debug a b\n", "")
    assert run("quiet").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["invalid"], 2, "tandem: FIELD_INVALID: two are wrong\n  a: b\n"),
        (["gone"], 3, "tandem: UNREACHABLE: nobody there\n"),
        (["bug"], 1, "tandem: ValueError: first line ... (--debug shows all)\n"),
        (["missing"], 1, "tandem: missing needs not_installed_at_all, which is not installed here\n"),
        (["broken"], 1, "tandem: broken needs no_such_module, which is not installed here\n"),
        (["ecko"], 2, "tandem: there is no command ecko; did you mean echo?\n"),
        (["zzz"], 2, "tandem: there is no command zzz; tandem --help lists the commands\n"),
        (
            ["--nope"],
            2,
            "tandem: there is no option --nope\nusage: tandem [--debug] COMMAND [ARGUMENTS...]\n",
        ),
    ],
)
def test_errors_are_short(run: Run, arguments: list[str], code: int, line: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_debug_shows_the_traceback(run: Run) -> None:
    done = run("--debug", "bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "second line" in done.stderr


def test_no_command_shows_the_usage(run: Run) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: tandem")


def test_an_interrupt_and_a_reader_who_leaves_are_no_errors(run: Run) -> None:
    interrupted = run("interrupt")
    assert (interrupted.returncode, interrupted.stderr) == (130, "")
    assert signal.SIGINT + 128 == 130
    assert run("many", pipe="| head -n 1").stderr == ""


def test_version(run: Run) -> None:
    assert run("--version").stdout.startswith("tandem ")
