"""The client for threads is the one for asyncio with the words of asyncio taken out, so that there is one to write.

`python -m tests.contract.unasync --write` makes `tandem/client/_sync` from `tandem/client/_aio`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "tandem" / "client"
WORDS = {
    r"async (def|for|with) ": r"\1 ",
    r"\bawait ": "",
    r"\baclosing\b": "closing",
    r"\b__aenter__\b": "__enter__",
    r"\b__aexit__\b": "__exit__",
    r"\bAsyncGenerator\[(\w+), None\]": r"Generator[\1, None, None]",
    r"\bAsyncGenerator\b": "Generator",
    r"\bAsync(Job|TandemClient)\b": r"\1",
    r"\b_aio\b": "_sync",
    r"\bconnect_aio\b": "connect",
    r"^import asyncio\n": "import time\n",
    r"^(import time\n)+": "import time\n",
    r"\basyncio\.sleep\b": "time.sleep",
}
INIT = '"""The client for threads, made by `tests.contract.unasync` from the one for asyncio: change that one."""\n'


def made() -> dict[Path, str]:
    """The modules for threads, by their paths."""
    found = {CLIENT / "_sync" / "__init__.py": INIT}
    for path in sorted((CLIENT / "_aio").glob("*.py")):
        if path.name != "__init__.py":
            found[CLIENT / "_sync" / path.name] = _formatted(
                _sync(path.read_text()), CLIENT / "_sync" / path.name
            )
    return found


def stale() -> list[str]:
    """The modules that are not what they would be made."""
    return [path.name for path, text in made().items() if not path.exists() or path.read_text() != text]


def _sync(text: str) -> str:
    for old, new in WORDS.items():
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return text


def _formatted(text: str, path: Path) -> str:
    for arguments in (["check", "--quiet", "--fix", "--select=I"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *arguments, f"--stdin-filename={path}", "-"]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=True, cwd=CLIENT.parents[1]
        )
        text = done.stdout
    return text


def main(arguments: list[str]) -> int:
    """Write the modules with `--write`; else say which are stale. Returns 1 if some are."""
    if arguments == ["--write"]:
        for path, text in made().items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return 0
    old = stale()
    for name in old:
        sys.stdout.write(f"tandem/client/_sync/{name} is stale: python -m tests.contract.unasync --write\n")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
