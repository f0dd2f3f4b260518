"""`python -m trainer_service.jobs.child FOLDER ATTEMPT`: the training itself, one process for each rank."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from tandem.errors import Aborted, DeadlineExceeded, InvalidArgument, TandemError, Unavailable
from trainer_service.jobs.folder import EventLog, JobFolder, Outcome

#: What may go well another time, with a service that came back.
_PASSING = (Aborted, DeadlineExceeded, Unavailable)


#: What the job's output says when it is told to end.
TOLD = b"told to end: the training stops, and saves, after the step that it is in\n"


class Stopped(BaseException):
    """The process was told to end before it trained."""


def main(argv: list[str]) -> int:
    """Train from the last complete checkpoint on, and tell how it ended."""
    folder, attempt = JobFolder(Path(argv[0])), int(argv[1])
    single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    main_process = int(os.environ.get("RANK", "0")) == 0
    report: Any = None

    def stop(number: int, frame: FrameType | None) -> None:
        if report is None or not report.training:
            raise Stopped
        report.stopping = True
        os.write(2, TOLD)  # as a handler may

    if single:  # of several, each would end after another step, and wait for the others for ever
        signal.signal(signal.SIGTERM, stop)
    outcome, reason = Outcome.FAILED, ""
    try:
        from trainer_service.jobs.report import Report

        report = Report(folder, EventLog(folder, attempt) if main_process else None)
        _train(folder, report)
        outcome = Outcome.STOPPED if report.stopping and not _is_done(report) else Outcome.SUCCEEDED
    except Stopped:
        outcome = Outcome.STOPPED
    except BaseException as error:  # noqa: BLE001  # whatever it is, the service is told
        traceback.print_exc()
        outcome, reason = _failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if main_process or outcome is Outcome.FAILED:
        folder.tell_outcome(attempt, outcome, reason)
    return 0 if outcome in (Outcome.SUCCEEDED, Outcome.STOPPED) else 1


def _train(folder: JobFolder, report: Any) -> None:
    import torch
    from transformers.trainer_callback import PrinterCallback

    from trainer_service.jobs import build

    spec = folder.spec()
    cpu = spec.hardware.cpu or not torch.cuda.is_available()
    trainer = build.trainer(spec, folder.path, cpu=cpu, callbacks=[report], record=report.record)
    report.attach(trainer)
    trainer.remove_callback(PrinterCallback)  # its lines are events already
    checkpoints = folder.checkpoints()
    trainer.train(resume_from_checkpoint=str(checkpoints[-1].path) if checkpoints else None)
    report.state = trainer.state
    trainer.close()


def _is_done(report: Any) -> bool:
    return bool(report.state.global_step >= report.state.max_steps)


def _failure(error: BaseException) -> tuple[Outcome, str]:
    """Whether another attempt may go well, and why this one did not."""
    if isinstance(error, TandemError):
        passing = isinstance(error, _PASSING) and not isinstance(error, InvalidArgument)
        return Outcome.DIED if passing else Outcome.FAILED, str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Outcome.FAILED, "DISK_FULL: the disk of the job's folder is full"
    lines = str(error).strip().splitlines() or ["no message"]
    return Outcome.FAILED, f"{type(error).__name__}: {lines[0]}"[:2000]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries that do not end would keep the process, and its GPU's memory
