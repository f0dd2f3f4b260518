"""A process that waited for its job is the job's then, for whoever looks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import spec
from trainer_service.jobs import processes, warm
from trainer_service.jobs.folder import JobFolder
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.standby import Waiting
from trainer_service.jobs.warm import Given

#: Tells what became of it where a job's output goes, waits for a file to be there, and lives on.
PROCESS = """
import json, os, sys, time
from trainer_service.jobs import warm
job = warm.given()
if job is None:
    sys.exit(7)
told = {"attempt": job.attempt, "variable": os.environ.get("OWN"), "mark": os.environ["TANDEM_JOB"],
        "asks": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"), "input": sys.stdin.read()}
print(json.dumps(told), flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "jobs" / "job-0123456789ab")
    made.make(spec())
    return made


def waiting(root: Path, code: str = PROCESS) -> tuple[Waiting, subprocess.Popen[bytes]]:
    kept = warm.environment(root)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=reading, env=os.environ | kept, start_new_session=True
    )
    os.close(reading)
    return Waiting(Identity.of(process.pid), writing, Path(kept[MARK])), process


def test_a_process_that_gets_a_job_has_its_mark_its_environment_and_its_output(folder: JobFolder) -> None:
    ready, process = waiting(folder.path.parent)
    other, bystander = waiting(folder.path.parent)
    try:
        assert processes.members(folder.path) == set()
        assert processes.members(ready.mark) == {process.pid}
        assert ready.give(Given(folder.path, 3, {MARK: str(folder.path), "OWN": "1"}))
        end = time.monotonic() + 60
        while not (told := folder.output_file.read_text() if folder.output_file.exists() else ""):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        assert json.loads(told) == {
            "attempt": 3,
            "variable": "1",
            "mark": str(folder.path),
            "asks": None,
            "input": "",
        }
        assert processes.members(folder.path) == {process.pid}  # by the mark alone
        assert processes.members(ready.mark) == set()
        processes.kill(folder.path, None)
        assert process.wait(60) == -9
        assert bystander.poll() is None
    finally:
        process.kill()
        process.wait(60)
        bystander.kill()
        bystander.wait(60)
        os.close(other.pipe)


def test_a_process_whose_service_ends_ends_too(folder: JobFolder) -> None:
    ready, process = waiting(folder.path.parent)
    os.close(ready.pipe)  # as the kernel does for a service that was killed
    assert process.wait(60) == 7


def test_a_process_that_has_ended_gets_no_job(folder: JobFolder) -> None:
    ready, process = waiting(folder.path.parent)
    process.kill()
    process.wait(60)
    assert not ready.give(Given(folder.path, 1, {MARK: str(folder.path)}))


def test_one_that_is_not_needed_leaves_nothing(folder: JobFolder) -> None:
    """Nor does what it has started."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], process_group=0); sys.stdin.read()"
    ready, process = waiting(folder.path.parent, code)
    end = time.monotonic() + 60
    while len(found := processes.members(ready.mark, ready.identity)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.returncode = 0  # waited for by `end`
    ready.end()
    assert not [pid for pid in found if processes.members(ready.mark, ready.identity)]


def test_a_job_folder_with_a_longer_name_than_there_is_room_for_is_refused(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / "jobs" / ("x" * 100))
    folder.make(spec())
    ready, process = waiting(folder.path.parent)
    assert ready.give(Given(folder.path, 1, {MARK: str(folder.path)}))
    assert process.wait(60) == 1  # rather than be one that nobody finds


@pytest.mark.parametrize(("answer", "program"), [(0, "a new one"), (3, "this one")])
def test_a_process_that_knows_the_gpus_starts_its_program_again(
    folder: JobFolder, tmp_path: Path, answer: int, program: str
) -> None:
    """The driver is the test's: it says that it was initialized (0), or that it was not (3)."""
    driver = tmp_path / "libcuda.so.1"
    source = f"int cuCtxGetCurrent(void **context) {{ *context = 0; return {answer}; }}"
    build = ["g++", "-shared", "-fPIC", "-x", "c", "-", "-o", str(driver)]
    subprocess.run(build, input=source, text=True, check=True, timeout=60)
    code = (
        "import os, sys\n"
        "from trainer_service.jobs import child, warm\n"
        "warm.load = lambda: None\n"
        "def start(program, arguments):\n"
        "    print('a new one', arguments[1:])\n"
        "    sys.exit(0)\n"
        "os.execv = start\n"
        "print('this one', child._awaited())\n"
    )
    job = Given(folder.path, 2, {MARK: str(folder.path), "CUDA_VISIBLE_DEVICES": "1"})
    own = {"LD_LIBRARY_PATH": str(tmp_path)} | warm.environment(folder.path.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], input=job.line(), env=os.environ | own, check=False, timeout=60
    )
    assert done.returncode == 0
    arguments = [str(folder.path), "2"]
    module = ["-m", "trainer_service.jobs.child"] if program == "a new one" else []
    assert folder.output_file.read_text() == f"{program} {module + arguments}\n"
