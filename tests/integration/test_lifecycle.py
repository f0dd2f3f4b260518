"""How a service begins and ends, in order and otherwise. Nothing of it is ever left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.engine.v1 import engine_pb2
from tandem.errors import Reason, Unavailable
from tandem.inference.v1 import inference_pb2 as pb
from tandem.rpc import connect
from tandem.weights.v1 import weights_pb2
from tests.faults import oracle, raw
from tests.integration.calls import LONG, Reading, ids, joined, refused, request, stats, until
from tests.services import ENGINE, ENVIRONMENT, inference_service

DELTAS = pb.OUTPUT_MODE_DELTAS
INFERENCE = "tandem.inference.v1.InferenceService"
STATUS = health_pb2.HealthCheckResponse.ServingStatus
ENGINE_FLAGS = [f"--engine={name}={value}" for name, value in ENGINE.items()]


def living(pids: list[int]) -> list[int]:
    """Those of the processes that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def own_tmp(folder: Path) -> dict[str, str]:
    """An environment with a folder of its own for temporary files, so that what is left there can be seen."""
    (folder / "tmp").mkdir(exist_ok=True)
    return {"TMPDIR": str(folder / "tmp")}


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(
    checkpoints: dict[str, Path], socket_folder: Path
) -> None:
    with inference_service(
        checkpoints["llama"], socket_folder, "--grace-s=6", environment=own_tmp(socket_folder)
    ) as service:
        children = service.children()
        watch = health_pb2_grpc.HealthStub(service.channel).Watch(
            health_pb2.HealthCheckRequest(service=INFERENCE)
        )
        versions = service.weights.WatchWeightVersion(weights_pb2.WatchWeightVersionRequest())
        assert next(watch).status == STATUS.SERVING
        assert next(versions).weight_version == 1
        short = Reading(service, request(ids([5], 8), sampling=LONG, output_mode=DELTAS))
        until(lambda: short.pieces, 20, "rollouts are under way")
        endless = Reading(service, request(ids([5], 1000), sampling=LONG))
        until(lambda: stats(service).num_waiting > 100, 20, "the long call is there")
        begin = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert next(watch).status == STATUS.NOT_SERVING
        assert not list(versions)  # it ends, and not with an error
        error = refused(lambda: service.inference.Generate(request(ids([5])), timeout=5))
        assert isinstance(error, Unavailable)
        assert {len(rollout.token_ids) for rollout in joined(short.end(seconds=20)).values()} == {200}
        assert short.error is None
        endless.end(seconds=20)
        assert endless.error is not None  # cut off at the end of the grace
        assert endless.error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert service.process.wait(20) == 0
        assert time.monotonic() - begin > 6
        until(lambda: not living(children), 5, "all its processes have ended")
        assert not Path(service.address.removeprefix("unix://")).exists()
        assert not list((socket_folder / "tmp").glob("tandem-*"))
        assert "Traceback" not in service.log.read_text()
        assert "engine died" not in service.log.read_text()


def test_sigterm_ends_a_stream_of_updates_in_which_none_is_open(
    checkpoints: dict[str, Path], socket_folder: Path
) -> None:
    with inference_service(checkpoints["llama"], socket_folder, "--grace-s=60") as service:
        policy = oracle.tensors_of(
            oracle.model_of(checkpoints["llama"]), [spec.name for spec in raw.manifest(service.weights)]
        )
        session = raw.Session(service.weights, policy, raw.STREAM)
        with session.begin(keep_stream=True) as update:
            for chunk in session.chunks(policy):
                update.send(chunk=chunk)
            update.commit(session.digest(policy))
            begin = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable) as caught:
                update.expect("ready")
            assert caught.value.reason == Reason.DRAINING
            assert service.process.wait(30) == 0
            assert time.monotonic() - begin < 30, "the grace is for what runs"


def test_a_service_whose_engine_was_killed_says_so_and_ends_in_order(
    checkpoints: dict[str, Path], socket_folder: Path
) -> None:
    with inference_service(
        checkpoints["llama"], socket_folder, environment=own_tmp(socket_folder)
    ) as service:
        children = service.children()
        watch = health_pb2_grpc.HealthStub(service.channel).Watch(
            health_pb2.HealthCheckRequest(service=INFERENCE)
        )
        assert next(watch).status == STATUS.SERVING
        running = [
            Reading(service, request(ids([5], 200), sampling=LONG, output_mode=mode))
            for mode in (DELTAS, pb.OUTPUT_MODE_FINISHED)
        ]
        until(lambda: running[0].pieces, 20, "rollouts are under way")
        scores = service.inference.Score(
            pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5] * 200)] * 50), timeout=30
        )
        pausing = service.engine.Pause.future(
            engine_pb2.PauseRequest(mode=engine_pb2.PAUSE_MODE_WAIT), timeout=60
        )
        time.sleep(0.05)
        core = next(pid for pid in children if "EngineCore" in " ".join(psutil.Process(pid).cmdline()))
        os.kill(core, signal.SIGKILL)
        for reading in running:
            reading.end(seconds=5)
            assert isinstance(reading.error, Unavailable)
            assert reading.error.reason == Reason.ENGINE_DEAD
        assert refused(lambda: scores).reason == Reason.ENGINE_DEAD
        assert refused(lambda: pausing.result(timeout=5)).reason == Reason.ENGINE_DEAD
        assert next(watch).status == STATUS.NOT_SERVING
        assert service.health("") == "NOT_SERVING"  # nothing here will be well again: start it anew
        for call in (
            lambda: service.inference.Generate(request(ids([5])), timeout=5),
            lambda: service.inference.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6])]), timeout=5),
            lambda: service.engine.Pause(engine_pb2.PauseRequest(), timeout=5),
            lambda: service.engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest(), timeout=5),
            lambda: service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=5),
            lambda: service.weights.GetManifest(weights_pb2.GetManifestRequest(), timeout=5),
        ):
            error = refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD)
        now = stats(service)
        assert (now.state, bool(now.reason)) == (engine_pb2.SERVING_STATE_DEAD, True)
        model = service.inference.GetModel(pb.GetModelRequest(), timeout=5)
        assert (model.state, model.max_model_len) == (engine_pb2.SERVING_STATE_DEAD, 256)
        assert service.stop() == 0
        until(lambda: not living(children), 10, "all its processes have ended")
        assert not list((socket_folder / "tmp").glob("tandem-*"))


def test_the_engine_ends_with_a_service_that_was_killed(
    checkpoints: dict[str, Path], socket_folder: Path
) -> None:
    """With a worker in a process of its own, as for tensor parallelism."""
    with inference_service(
        checkpoints["llama"], socket_folder, environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ) as service:
        children = service.children()
        names = " ".join(" ".join(psutil.Process(pid).cmdline()) for pid in children)
        assert "EngineCore" in names
        assert "Worker" in names
        # More than can end before the kill, however late that comes on a busy machine.
        reading = Reading(service, request(ids([5], 1000), sampling=LONG, output_mode=DELTAS))
        until(lambda: reading.pieces, 20, "rollouts are under way")
        service.process.kill()
        reading.end(seconds=5)
        assert isinstance(reading.error, Unavailable), f"{reading.num_tokens} tokens came"
        until(lambda: not living(children), 15, "all its processes have ended")


def test_the_engine_ends_with_a_service_that_was_killed_while_it_loaded(
    checkpoints: dict[str, Path], socket_folder: Path
) -> None:
    with inference_service(checkpoints["llama"], socket_folder, wait=False) as service:
        children = until(
            lambda: len(found := service.children()) >= 2 and found, 60, "an engine is being started"
        )
        assert (service.health(), service.health("")) == ("NOT_SERVING", "SERVING")
        assert stats(service).state == engine_pb2.SERVING_STATE_LOADING
        for call in (
            lambda: service.inference.GetModel(pb.GetModelRequest(), timeout=5),
            lambda: service.inference.Generate(request(ids([5])), timeout=5),
            lambda: service.engine.Pause(engine_pb2.PauseRequest(), timeout=5),
            lambda: service.weights.GetManifest(weights_pb2.GetManifestRequest(), timeout=5),
        ):
            error = refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_LOADING)
        service.process.kill()
        until(
            lambda: not living(children), 60, "all its processes have ended"
        )  # those that import vLLM need a while


@contextlib.contextmanager
def command(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`tandem inference` with its socket in `folder`. Whatever happens, no process of it is left."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tandem.cli",
            "inference",
            f"--addresses=unix://{folder}/inference.sock",
            *arguments,
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)


@pytest.mark.parametrize("moment", ["importing", "starting"])
def test_sigterm_while_loading_ends_at_once(
    checkpoints: dict[str, Path], socket_folder: Path, moment: str
) -> None:
    socket = socket_folder / "inference.sock"
    with command(socket_folder, f"--model={checkpoints['llama']}", *ENGINE_FLAGS) as process:
        with connect(f"unix://{socket}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
        children = psutil.Process(process.pid).children
        if moment == "starting":
            until(lambda: len(children(recursive=True)) >= 2, 60, "an engine is being started")
            time.sleep(1)
        pids = [child.pid for child in children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert not socket.exists()
        until(lambda: not living(pids), 5, "all its processes have ended")


def test_a_start_that_cannot_be_says_why_in_a_line(checkpoints: dict[str, Path], socket_folder: Path) -> None:
    """All at once, since most of the time goes into importing vLLM."""
    (socket_folder / "empty").mkdir()
    model = f"--model={checkpoints['llama']}"
    cases: dict[str, tuple[list[str], int, list[str]]] = {
        "missing": (["--model=/nowhere/at/all"], 2, ["model: ", "/nowhere/at/all"]),
        "empty": ([f"--model={socket_folder}/empty"], 2, ["model: ", "config.json"]),
        "unknown": (["--model=nobody/nothing"], 2, ["model: ", "nobody/nothing"]),
        "argument": (
            [model, "--engine=max_model_length=128"],
            2,
            ["engine.max_model_length: ", "max_model_len?"],
        ),
        "value": ([model, "--engine=max_model_len=many"], 2, ["engine.max_model_len: ", "integer"]),
        "large": ([model, "--engine=max_model_len=100000"], 2, ["engine.max_model_len: ", "100000"]),
        "own": ([model, "--engine=load_format=auto"], 2, ["engine.load_format: "]),
        "setting": ([model, "--lease-timeout-s=0"], 2, ["lease_timeout_s: "]),
        "flag": ([model, "--nonsense=1"], 2, ["--nonsense=1"]),
        "none": ([], 2, ["model: ", "required"]),
        "engine": (
            [model, *ENGINE_FLAGS, "--engine=kv_cache_memory_bytes=100"],
            1,
            ["the engine did not start"],
        ),
    }
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (arguments, _, _) in cases.items():
            (socket_folder / name[:3]).mkdir()
            running[name] = stack.enter_context(command(socket_folder / name[:3], *arguments))
        for name, (_, code, words) in cases.items():
            _, said = running[name].communicate(timeout=280)
            last = said.strip().splitlines()[-1]
            assert running[name].returncode == code, (name, said[-2000:])
            assert all(word.lower() in last.lower() for word in words), (name, last)
            assert len(last) < 600, (name, last)
            assert not (socket_folder / name[:3] / "inference.sock").exists()
