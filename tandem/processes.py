"""Processes that end with this one, however it ends short of SIGKILL."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 15.0
POLL_S = 0.1


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """Somebody wants this program to end."""


class ChildError(RuntimeError):
    """A process failed. The message has the end of its log."""


class Child:
    """A running Python module, with what it starts itself a process group. Its output is in a file, or where ours is.

    However this process ends, the child is told to end then (SIGTERM).
    """

    def __init__(
        self, module: str, arguments: list[str], log: Path | None, environment: Mapping[str, str]
    ) -> None:
        self.name, self.log = module, log
        with log.open("wb") if log else contextlib.nullcontext() as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
                start_new_session=True,  # so that Ctrl-C reaches only us, and we end it in order
                preexec_fn=_end_with_parent,
            )

    def ended(self) -> bool:
        """Whether it has done its work.

        Raises:
            ChildError: it has failed.
        """
        code = self._process.poll()
        if code and self.log is None:
            raise ChildError(f"{self.name} ended with code {code}: its output above says why")
        if code and self.log is not None:
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise ChildError(f"{self.name} ended with code {code}. {self.log} ends:\n{end}")
        return code == 0

    def stop(self) -> None:
        """End it, kindly at first, and then all that is left of its group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Processes:
    """Starts children, and has ended them all when its context is left. Turns signals into Interrupted.

    A signal is noticed in `wait`, and nowhere between a child's start and its being known here.
    """

    def __init__(self, folder: Path | None, environment: Mapping[str, str]) -> None:
        """Output goes to logs in `folder`, or to where ours goes; `environment` is added to this process's."""
        self._folder, self._environment = folder, environment
        self._children: list[Child] = []
        self._signal = 0

    def __enter__(self) -> Processes:
        self._handlers = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            child.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, name: str, module: str, **flags: Any) -> Child:
        """Run `python -m module --flag=value`, with its log in `name`.log. A list repeats its flag; None is no flag."""
        arguments = [
            f"--{flag.replace('_', '-')}={value}"
            for flag, values in flags.items()
            if values is not None
            for value in (values if isinstance(values, list) else [values])
        ]
        log = self._folder / f"{name}.log" if self._folder else None
        child = Child(module, arguments, log, self._environment)
        self._children.append(child)
        return child

    def wait(self) -> None:
        """Wait for a moment.

        Raises:
            Interrupted: this process has been told to end.
        """
        time.sleep(POLL_S)
        if self._signal:
            raise Interrupted(signal.Signals(self._signal).name)


def _end_with_parent() -> None:
    """In a child, before its program: have the kernel end it with us. Nothing is allocated or imported here."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
