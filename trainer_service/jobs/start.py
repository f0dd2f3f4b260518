"""How processes of jobs are started: in sessions of their own, so that what ends the service does not end them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping

from trainer_service.jobs.folder import JobFolder
from trainer_service.jobs.gpus import needed
from trainer_service.jobs.processes import MARK, Identity
from trainer_service.jobs.run import ENGINE_GPUS
from trainer_service.jobs.store import Job


def spawn(folder: JobFolder, job: Job) -> Identity:
    """Start an attempt's process. Raises OSError."""
    with folder.output_file.open("ab") as output:
        arguments = [str(folder.path), str(job.attempt)]
        return launch(arguments, environment(folder, job), subprocess.DEVNULL, output.fileno())


def environment(folder: JobFolder, job: Job) -> dict[str, str]:
    """What the processes of one job alone have in their environment."""
    training = needed(job.spec, job.gpus)[0]
    return {
        MARK: str(folder.path),
        "CUDA_VISIBLE_DEVICES": ",".join(job.gpus[:training]),
        ENGINE_GPUS: ",".join(job.gpus[training:]),
    }


def launch(arguments: list[str], own: Mapping[str, str], given: int, output: int) -> Identity:
    """Start `python -m trainer_service.jobs.run` with `own` added to the service's environment."""
    kept = {
        name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"
    }  # systemd's, ours alone
    paths = [os.getcwd(), *filter(None, [kept.get("PYTHONPATH")])]  # where a reward's module may be
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer_service.jobs.run", *arguments],
        stdin=given,
        stdout=output,
        stderr=output,
        env=kept | {"PYTHONPATH": os.pathsep.join(paths)} | dict(own),
        start_new_session=True,
    )
    # Waited for by its identity, as those of earlier services are: not by the object, which would complain.
    process.returncode = 0
    return Identity.of(process.pid)


def reap(identity: Identity) -> None:
    """Wait for a process that has ended, if it is this one's child."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # an earlier service's
        if Identity.of(identity.pid) == identity:  # else its id is another child's by now
            os.waitpid(identity.pid, 0)
