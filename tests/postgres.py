"""A PostgreSQL server of the tests' own, where one is installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest


def _binaries() -> Path | None:
    """The folder with PostgreSQL's programs: on the path, or where Debian keeps the newest."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    kept = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return kept[-1].parent if kept else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Its URL, with a database that nobody else uses. Skips the test where there is no server to start."""
    programs = _binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    user: dict[str, Any] = {}
    owner = os.geteuid()
    if owner == 0:  # which it refuses to run as
        try:
            owner = pwd.getpwnam("postgres").pw_uid
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with tempfile.TemporaryDirectory(prefix="tdp") as name:
        folder = Path(name)
        data = folder / "data"
        os.chown(folder, owner, -1)
        make = [programs / "initdb", "-D", data, "-U", "tandem", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, timeout=120, cwd=folder, **user)
        flags = ["-D", data, "-k", folder, "-h", "", "-F"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", *flags], stdout=log, stderr=log, cwd=folder, **user
            )
        try:
            _wait(folder, server)
            yield f"postgresql+psycopg://tandem@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(60)


def _wait(folder: Path, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user="tandem", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            text = (folder / "log").read_text(errors="replace")
            assert server.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.05)


def empty(url: str) -> None:
    """Forget all tables."""
    host = url.rpartition("=")[2]
    with psycopg.connect(host=host, user="tandem", dbname="postgres", autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def end_connections(url: str) -> None:
    """Have the server end all connections but this one, as a restart does, and wait until it has."""
    others = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND usename = %s
    """
    host = url.rpartition("=")[2]
    with psycopg.connect(host=host, user="tandem", dbname="postgres", autocommit=True) as connection:
        connection.execute(others, ["tandem"])
