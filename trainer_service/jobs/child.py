"""`python -m trainer_service.jobs.child FOLDER ATTEMPT`: the training itself, one process for each rank.

With - in place of FOLDER and ATTEMPT it loads its libraries, and waits for a job.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from tandem.errors import Aborted, DeadlineExceeded, InvalidArgument, TandemError, Unavailable
from trainer_service.jobs import warm
from trainer_service.jobs.folder import FULL, EventLog, JobFolder, Outcome, is_full
from trainer_service.jobs.stopping import TOLD, Stopped
from trainer_service.ranks import OtherRankError

#: What may go well another time, with a service that came back.
_PASSING = (Aborted, DeadlineExceeded, Unavailable)
#: What gloo says to a rank that waits for one that has ended.
_CLOSED = re.compile(
    r"gloo/transport/.*(Connection (closed|reset) by peer|Connection refused|Broken pipe)", re.DOTALL
)


def main(argv: list[str]) -> int:
    """Train from the last complete checkpoint on, and tell how it ended."""
    folder, attempt = JobFolder(Path(argv[0])), int(argv[1])
    single = int(os.environ.get("WORLD_SIZE", "1")) == 1
    main_process = int(os.environ.get("RANK", "0")) == 0
    report: Any = None
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if report is not None:
            report.stopping = True
        if report is None or not report.training:
            raise Stopped
        os.write(2, TOLD)  # as a handler may

    if single:  # several are told by a file, which `Report` reads: they have to end after the same step
        signal.signal(signal.SIGTERM, stop)
    outcome, reason = Outcome.FAILED, ""
    try:
        from trainer_service.jobs.report import Report

        events = EventLog(folder, attempt) if main_process else None
        report = Report(folder, events, stop_file=folder.stop_file(attempt))
        report.stopping = told  # a library may have swallowed what the handler raised in its midst
        _train(folder, attempt, report)
        if _is_done(report):
            outcome = Outcome.SUCCEEDED
        elif report.stopping:
            outcome = Outcome.STOPPED
        else:  # transformers warns of it, and returns as from a whole training
            done = f"{report.state.global_step} of {report.state.max_steps} steps are done"
            reason = f"the dataset has too few prompts for a batch: {done}"
    except Stopped:
        outcome = Outcome.STOPPED
    except BaseException as error:  # noqa: BLE001  # whatever it is, the service is told
        if told and (report is None or not report.training):  # it may have made another error of it, too
            outcome = Outcome.STOPPED
        else:
            with contextlib.suppress(OSError):  # of a full disk, to which the output goes
                traceback.print_exc()
            outcome, reason = _failure(error, folder)
    _flush()
    if main_process or outcome is Outcome.FAILED:
        # A rank that fails ends the others, which may be quicker to tell that they were left alone.
        folder.tell_outcome(
            attempt, outcome, reason, over=(Outcome.DIED,) if outcome is Outcome.FAILED else ()
        )
    return 0 if outcome in (Outcome.SUCCEEDED, Outcome.STOPPED) else 1


def _train(folder: JobFolder, attempt: int, report: Any) -> None:
    import torch
    from transformers.trainer_callback import PrinterCallback

    from trainer_service.jobs import build
    from trainer_service.jobs.accountant import Accountant

    spec = folder.spec()
    # Each of several processes on the CPU has the device cpu:0, which torch.load does not know.
    torch.serialization.register_package(
        0, lambda _: None, lambda part, place: part if place == "cpu:0" else None
    )
    cpu = spec.hardware.cpu or not torch.cuda.is_available()
    trainer = build.trainer(spec, folder.path, cpu=cpu, callbacks=[report], record=report.record)
    report.attach(trainer)
    trainer.add_callback(Accountant(folder, attempt, trainer))
    trainer.remove_callback(PrinterCallback)  # its lines are events already
    checkpoints = folder.checkpoints()
    trainer.train(resume_from_checkpoint=str(checkpoints[-1].path) if checkpoints else None)
    report.state = trainer.state
    trainer.close()


def _is_done(report: Any) -> bool:
    return bool(report.state.global_step >= report.state.max_steps)


def _failure(error: BaseException, folder: JobFolder) -> tuple[Outcome, str]:
    """Whether another attempt may go well, and why this one did not."""
    if is_full(error, folder.path):
        return Outcome.FAILED, f"{FULL}: {_first_line(error)}"
    if isinstance(error, TandemError):
        passing = isinstance(error, _PASSING) and not isinstance(error, InvalidArgument)
        return Outcome.DIED if passing else Outcome.FAILED, str(error).partition("\n")[0]
    if isinstance(error, OtherRankError):  # it says what the other rank does
        return Outcome.FAILED, _first_line(error)
    said = f"{type(error).__name__}: {_first_line(error)}"
    if _CLOSED.search(str(error)):  # another rank ended: if it could, it tells why
        return Outcome.DIED, said
    if (cause := error.__cause__) is not None:  # a library's own words may say no more than that it failed
        said += f"; {type(cause).__name__}: {_first_line(cause)}"
    return Outcome.FAILED, said


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:2000]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _awaited() -> list[str]:
    """Load, wait, and then FOLDER ATTEMPT. Ends the process where no job comes."""
    warm.load()
    job = warm.given()
    if job is None:
        sys.exit(0)
    arguments = [str(job.folder), str(job.attempt)]
    if warm.knows_gpus():  # all of them, and not those of the job: a new program knows none yet
        os.execv(sys.executable, [sys.executable, "-m", "trainer_service.jobs.child", *arguments])  # noqa: S606
    return arguments


if __name__ == "__main__":
    code = main(_awaited() if sys.argv[1] == warm.LATER else sys.argv[1:])
    _flush()
    os._exit(code)  # threads of libraries that do not end would keep the process, and its GPU's memory
