"""Folders for sockets and copies, and what is left of them where their process is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inference_service import folders
from inference_service.folders import Folder

MAKES = """
import sys
from inference_service.folders import Folder
print(Folder("kept").path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(folders.tempfile, "tempdir", None)  # it is remembered
    folders._sweep.cache_clear()


def another() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_process_leaves_a_folder_that_the_next_removes() -> None:
    dead, left = another()
    living, used = another()
    (left / "copy").write_text("of an adapter")
    dead.kill()
    dead.communicate()
    assert left.is_dir()
    mine = Folder("mine")
    assert not left.exists()
    assert used.is_dir()
    living.communicate("", timeout=10)
    mine.remove()
    mine.remove()
    assert not mine.path.exists()


def test_only_this_user_enters_it_and_nothing_of_another_name_is_touched(tmp_path: Path) -> None:
    for name in ("tandem-0", "tandem-other-x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / "tandem-link-x").symlink_to(tmp_path / "elsewhere")
    folder = Folder("sockets")
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.path.name.startswith("tandem-sockets-")
    folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "elsewhere",
        "other",
        "tandem-0",
        "tandem-link-x",
        "tandem-other-x",
    ]
    assert (tmp_path / "elsewhere" / "lock").exists()
