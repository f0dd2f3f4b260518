"""What the doctor finds is what is there."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tandem.cli import check_gpu, check_host, check_services, doctor, main
from tandem.cli.findings import Finding, Verdict
from tests.scripted import Script, served


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.check: finding for finding in findings}
    assert len(named) == len(findings), "two findings of one name"
    return named


def test_every_check_says_what_it_found_and_what_to_mend(socket_folder: Path) -> None:
    places = {name: f"unix://{socket_folder}/{name}.sock" for name in ("inference", "trainer")}
    findings = by_check(doctor.examine(dict(places)))
    assert {"python", "torch", "gpu", "memory sharing", "shared memory", "disk"} <= set(findings)
    assert {f"{name} {what}" for name in places for what in ("address", "service")} <= set(findings)
    assert all(finding.found for finding in findings.values())
    assert all(finding.mend for finding in findings.values() if finding.verdict is Verdict.MEND)
    assert findings["memory sharing"].verdict is Verdict.OK


def test_its_output_is_lines_of_json_and_its_code_says_whether_something_is_wrong(
    capsys: pytest.CaptureFixture[str], socket_folder: Path
) -> None:
    places = [f"--{name}=unix://{socket_folder}/{name}.sock" for name in ("inference", "trainer")]
    code = main(["doctor", "--json", *places])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(row) == {"check", "verdict", "found", "mend"} for row in rows)
    wrong = [row for row in rows if row["verdict"] == "mend"]
    assert code == (1 if wrong else 0)
    (socket_folder / "trainer.sock").write_text("no socket")
    assert main(["doctor", *places]) == 1
    out = capsys.readouterr().out
    assert f"mend  trainer address: {socket_folder}/trainer.sock is no socket\n      -> " in out
    assert f": {len(wrong) + 1} to mend, " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("versions", "verdicts"),
    [
        ({"vllm": "0.31.0", "trl": "1.16.2", "torch": "2.13.0+cpu"}, {}),
        (
            {"vllm": "0.25.9", "trl": "1.17.0", "torch": "2.14"},
            dict.fromkeys(("vllm", "trl", "torch"), "mend"),
        ),
        ({"vllm": "0.32.0rc1", "trl": "1.16"}, {"vllm": "mend", "torch": "mend"}),
        ({"trl": "1.16.0", "torch": "2.11.0+cu130"}, {"vllm": "note"}),
        ({"vllm": "0.26.0", "torch": "2.11.0"}, {"trl": "note"}),
        ({"torch": "2.11.0"}, {"vllm": "mend", "trl": "mend"}),
    ],
)
def test_versions(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], verdicts: dict[str, str]
) -> None:
    have = {"grpcio": "1.85.1", "protobuf": "6.33.5"} | versions
    monkeypatch.setattr(check_host, "installed", have.get)
    findings = by_check(list(check_host.python()))
    assert {name: found.verdict for name, found in findings.items() if found.verdict != "ok"} == verdicts


def test_too_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_host, "free", lambda path: 64 << 20)
    assert by_check(list(check_host.ipc()))["shared memory"].verdict is Verdict.MEND
    monkeypatch.setattr(check_host, "free", lambda path: None)
    assert by_check(list(check_host.ipc()))["shared memory"].verdict is Verdict.MEND


def test_memory_that_cannot_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    findings = by_check(list(check_host.ipc()))
    assert findings["memory sharing"].verdict is Verdict.MEND
    assert findings["process watching"].verdict is Verdict.NOTE


class Driver:
    """A libcuda and a libnccl."""

    def __init__(self, *, init: int = 0, count: int = 1, version: int = 13000) -> None:
        self.init, self.count, self.version = init, count, version

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self.count  # type: ignore[attr-defined]
        return 0

    def cuDriverGetVersion(self, number: object) -> int:
        number._obj.value = self.version  # type: ignore[attr-defined]
        return 0

    def ncclGetVersion(self, number: object) -> int:
        number._obj.value = 22809  # type: ignore[attr-defined]
        return 0


@pytest.mark.parametrize(
    ("driver", "torch", "verdicts"),
    [
        (Driver(), "2.11.0+cu130", {"gpu": "ok", "torch's CUDA": "ok", "nccl": "ok"}),
        (Driver(version=12090), "2.11.0+cu130", {"gpu": "ok", "torch's CUDA": "mend", "nccl": "ok"}),
        (Driver(version=13020), "2.13.0+cpu", {"gpu": "ok", "torch's CUDA": "mend", "nccl": "ok"}),
        (Driver(), "2.11.0", {"gpu": "ok", "nccl": "ok"}),
        (Driver(init=999), "2.11.0+cu130", {"gpu": "mend"}),
        (Driver(count=0), "2.11.0+cu130", {"gpu": "mend"}),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, driver: Driver, torch: str, verdicts: dict[str, str]) -> None:
    monkeypatch.setattr(check_gpu.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(check_gpu, "installed", {"torch": torch}.get)
    findings = by_check(list(check_gpu.gpus()))
    found = {name: finding.verdict for name, finding in findings.items() if name != "cupy"}
    assert found == verdicts
    assert "nccl" not in findings or findings["nccl"].found == "2.28.9"


def test_gpus_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(check_gpu.ctypes, "CDLL", missing)
    monkeypatch.setattr(check_gpu.Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    assert [finding.verdict for finding in check_gpu.gpus()] == [Verdict.MEND]
    monkeypatch.setattr(check_gpu.Path, "glob", lambda self, pattern: iter([]))
    assert [finding.verdict for finding in check_gpu.gpus()] == [Verdict.NOTE]
    assert check_gpu._nccl(1).verdict is Verdict.NOTE
    assert check_gpu._nccl(2).verdict is Verdict.MEND


def addresses(**places: str) -> dict[str, Finding]:
    return by_check([*check_services.folders(places), *check_services.services(places)])


def test_addresses(socket_folder: Path) -> None:
    assert addresses(trainer="nonsense")["trainer address"].verdict is Verdict.MEND
    far = addresses(trainer=f"unix://{socket_folder}/none/t.sock")
    assert far["trainer address"].mend == f"mkdir -m 700 {socket_folder}/none"
    open_to_all = socket_folder / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    found = addresses(trainer=f"unix://{open_to_all}/t.sock")
    assert "every user may replace" in found["trainer address"].found


def test_services(socket_folder: Path) -> None:
    with served(Script(), socket_folder) as address:  # gRPC, without the health service
        found = addresses(trainer=address)
        assert found["trainer service"].found == f"another service is at {address}"
        assert found["trainer processes"].found == f"process {os.getpid()}, in the same PID namespace"
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        silent = addresses(trainer=place)["trainer service"]
    assert silent.verdict is Verdict.MEND
    assert addresses(trainer=place)["trainer service"].verdict is Verdict.NOTE
