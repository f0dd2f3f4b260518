"""The client's commands, against a service that answers as the test says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tandem.cli import main
from tandem.errors import InvalidArgument, Reason, Violation
from tandem.trainer.v1 import job_pb2
from tandem.trainer.v1 import trainer_pb2 as pb
from tests.scripted import Script, line, served, state

Tandem = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def tandem(
    script: Script,
    socket_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Tandem]:
    """Run the command: its code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    with served(script, socket_folder) as address:
        monkeypatch.setenv("TANDEM_TRAINER_ADDRESS", address)
        yield run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text('[model]\npath = "/models/policy"\n[grpo]\n')
    return path


def figures(sequence: int, step: int, **values: float) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(
        sequence=sequence, metrics=job_pb2.StepMetrics(step=step, max_steps=2, values=values)
    )


def whole(script: Script, ends: str = "SUCCEEDED") -> None:
    """A job that has run: five events."""

    def stream(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        events = [
            state(1, "RUNNING"),
            line(2),
            figures(3, 1, reward=0.5, loss=1.0),
            figures(4, 2, reward=1.0),
            state(5, ends),
        ]
        kinds = {pb.EVENT_KIND_STATE: "state", pb.EVENT_KIND_METRICS: "metrics", pb.EVENT_KIND_LOG: "log"}
        wanted = {kinds[kind] for kind in request.kinds} or set(kinds.values())
        yield [e for e in events if e.sequence > request.after_sequence and e.WhichOneof("event") in wanted]

    script.over(ends, 5)
    script.rounds = [stream, stream]


def test_submit_writes_the_id_alone(tandem: Tandem, script: Script, file: Path) -> None:
    assert tandem("submit", str(file), "--request-id", "mine") == (0, "j1\n", "")
    (request,) = script.created
    assert (request.request_id, request.job.model.path) == ("mine", "/models/policy")


def test_submit_only_checks(tandem: Tandem, script: Script, file: Path) -> None:
    assert tandem("submit", "--check", str(file)) == (0, "it would be taken\n", "")
    assert script.created[0].validate_only


def test_submit_sets_what_the_file_has_otherwise(tandem: Tandem, script: Script, file: Path) -> None:
    given = ["--set", "training.max_steps=2", '--set=inference.service.addresses=["unix:///i.sock"]']
    assert tandem("submit", str(file), *given, "--set=model.revision=a=b")[0] == 0
    job = script.created[0].job
    assert (job.training.max_steps, list(job.inference.service.addresses)) == (2, ["unix:///i.sock"])
    assert (job.model.path, job.model.revision) == ("/models/policy", "a=b")
    code, _, err = tandem("submit", str(file), "--set=training.max_stepz=2")
    assert (code, err.partition(": there is")[0]) == (2, "tandem: FIELD_INVALID: job.training.max_stepz")


def test_submit_says_what_is_wrong_with_the_file(tandem: Tandem, script: Script, file: Path) -> None:
    file.write_text("[model]\npth = 1\n")
    code, out, err = tandem("submit", str(file))
    assert (code, out) == (2, "")
    assert err == "tandem: FIELD_INVALID: job.model.pth: there is no such field; did you mean path?\n"
    assert not script.created


def test_submit_says_what_the_service_refuses(tandem: Tandem, script: Script, file: Path) -> None:
    wrong = [Violation("job.rewards", "is empty"), Violation("job.inference", "is missing")]
    script.refuse = [InvalidArgument(Reason.FIELD_INVALID, "two are wrong", violations=wrong)]
    code, out, err = tandem("submit", str(file))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "tandem: FIELD_INVALID: two are wrong",
        "  job.rewards: is empty",
        "  job.inference: is missing",
    ]


def test_submit_may_watch(tandem: Tandem, script: Script, file: Path) -> None:
    whole(script)
    code, out, _ = tandem("submit", str(file), "--watch")
    assert code == 0
    assert out.splitlines()[0] == "j1"
    assert out.splitlines()[-1].endswith("Z SUCCEEDED")


@pytest.mark.parametrize(("ends", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_watch_writes_a_line_for_each_event_where_no_terminal_is(
    tandem: Tandem, script: Script, ends: str, code: int
) -> None:
    whole(script, ends)
    done, out, err = tandem("watch", "j1")
    assert (done, err) == (code, "")
    assert [text.partition(" ")[2] for text in out.splitlines()] == [
        "RUNNING",
        "log line 2",
        "step 1/2 reward 0.5 loss 1",
        "step 2/2 reward 1",
        ends,
    ]


def test_watch_draws_a_board_on_a_terminal(
    tandem: Tandem, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(script)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = tandem("watch", "j1")
    assert (code, err) == (0, "")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).splitlines()[-4:]
    assert [text.split()[0] for text in last] == ["j1", "step", "reward", "loss"]
    assert last[0].split()[-1] == "SUCCEEDED"
    assert last[1].split()[-1] == "2/2"
    assert last[2].split()[1:] == ["▁█", "1"]


def test_watch_goes_on_where_one_was(tandem: Tandem, script: Script) -> None:
    whole(script)
    _, out, _ = tandem("watch", "j1", "--after", "4")
    assert len(out.splitlines()) == 1


def test_logs_of_a_job_that_runs_end_where_it_is(tandem: Tandem, script: Script) -> None:
    whole(script)
    script.job.state = job_pb2.JOB_STATE_RUNNING
    assert tandem("logs", "j1") == (0, "line 2\n", "")
    assert list(script.asked[0].kinds) == []


def test_logs_of_a_job_that_is_over(tandem: Tandem, script: Script) -> None:
    whole(script)
    assert tandem("logs", "j1") == (0, "line 2\n", "")
    assert list(script.asked[0].kinds) == [pb.EVENT_KIND_LOG]


def test_jobs_are_listed(tandem: Tandem, script: Script) -> None:
    code, out, _ = tandem("jobs", "--limit", "3", "--state", "running", "--label", "team=a")
    assert code == 0
    head, *rows = out.splitlines()
    assert head.split() == ["JOB", "STATE", "ALGORITHM", "STEP", "AGE", "REASON"]
    assert [row.split()[0] for row in rows] == ["j0", "j1", "j2"]
    (request,) = script.listed
    assert list(request.states) == [job_pb2.JOB_STATE_RUNNING]
    assert (dict(request.labels), request.page_size) == ({"team": "a"}, 3)
    _, out, _ = tandem("jobs", "--json")
    facts = [json.loads(row) for row in out.splitlines()]
    assert [job["id"] for job in facts] == ["j0", "j1", "j2", "j3", "j4"]
    assert {"state", "step", "reason", "labels", "start_time"} <= set(facts[0])


def test_a_job_is_cancelled_resumed_and_deleted(tandem: Tandem, script: Script) -> None:
    assert tandem("cancel", "j1") == (0, "j1 CANCELLED\n", "")
    assert tandem("resume", "j1") == (0, "j1 QUEUED\n", "")
    script.job.state = job_pb2.JOB_STATE_RUNNING
    code, _, err = tandem("resume", "j1")
    assert (code, err) == (1, "tandem: JOB_STATE: job j1 is RUNNING\n")
    assert tandem("delete", "j1") == (0, "j1 deleted\n", "")
    assert script.deleted == ["j1"]


def test_cancel_may_wait(tandem: Tandem, script: Script) -> None:
    whole(script, "CANCELLED")
    assert tandem("cancel", "--wait", "j1") == (0, "j1 CANCELLED\n", "")


def test_a_plot_is_a_png(tandem: Tandem, script: Script, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole(script)
    out = tmp_path / "curves.png"
    assert tandem("plot", "j1", "--out", str(out)) == (0, f"{out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")
    whole(script)
    code, _, err = tandem("plot", "j1", "--out", str(tmp_path / "none" / "x.png"))
    assert code == 2
    assert "No such file or directory" in err
    whole(script)
    assert "the job has no 'kl'; it has loss, reward" in tandem("plot", "j1", "--metric", "kl")[2]


def test_a_plot_without_matplotlib_says_what_it_needs(
    tandem: Tandem, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = tandem("plot", "j1")
    assert code == 1
    assert err == "tandem: plot needs matplotlib, which is not installed here\n"
    assert not script.asked


@pytest.mark.parametrize("command", ["watch", "logs", "plot", "cancel", "resume"])
def test_a_job_that_is_not_there_is_one_line(tandem: Tandem, command: str) -> None:
    assert tandem(command, "j9") == (1, "", "tandem: JOB_NOT_FOUND: there is no job j9\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit"],
        ["watch"],
        ["jobs", "--limit", "many"],
        ["jobs", "--limit", "0"],
        ["cancel"],
        ["generate", "--top-p", "x"],
        ["doctor", "--nope"],
        ["plot", "j1", "--nope"],
        ["up", "--nope"],
    ],
)
def test_wrong_arguments_are_one_line(tandem: Tandem, arguments: list[str]) -> None:
    code, out, err = tandem(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"tandem {arguments[0]}: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["jobs", "--label", "x"], "label: must be NAME=VALUE, is 'x'"),
        (["jobs", "--state", "busy"], "states: there is no state 'BUSY'"),
        (["jobs", "--trainer", "nowhere"], "'nowhere' has no port"),
        (["jobs", "--token-file", "/none"], "token_file: cannot read /none"),
        (["submit", "/none.toml", "--set", "x"], "set: must be NAME=VALUE, is 'x'"),
        (["submit", "/none.toml"], "job: cannot read /none.toml: No such file or directory"),
        (["generate", "hi", "--inference", "unix:///none", "--param", "x"], "param: must be NAME=VALUE"),
        (
            ["generate", "hi", "--inference", "unix:///none", "--param", "x=1"],
            "sampling.x: there is no such field",
        ),
    ],
)
def test_wrong_values_name_their_field(tandem: Tandem, arguments: list[str], text: str) -> None:
    code, out, err = tandem(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tandem: FIELD_INVALID: ")
    assert text in err


def test_nobody_there(tandem: Tandem, socket_folder: Path) -> None:
    code, _, err = tandem("jobs", "--trainer", f"unix://{socket_folder}/none.sock")
    assert code == 3
    assert err.startswith("tandem: UNREACHABLE: ")


def test_an_interrupted_watch_ends_at_once(tandem: Tandem, script: Script) -> None:
    left = threading.Event()

    def stays(request: pb.WatchJobRequest) -> Iterator[list[job_pb2.JobEvent]]:
        yield [line(1)]
        left.wait(20)

    script.rounds = [stays]
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem.cli", "watch", "j1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline().endswith("log line 1\n")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    left.set()
    assert (process.returncode, err) == (130, "")
