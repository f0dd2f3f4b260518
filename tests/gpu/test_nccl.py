"""A trainer on one GPU brings its weights to an engine on another by NCCL, and either may die in the middle of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.errors import Reason, TandemError
from tandem.inference.v1 import inference_pb2 as pb
from tandem.weights.v1 import weights_pb2
from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import RATE, assert_agrees, digest, digest_of
from tests.services import ENVIRONMENT, Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.weights import PolicyWeights
from weight_transfer.cuda import nccl
from weight_transfer.sparse import bits
from weight_transfer.transports import Sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
MODES = pytest.mark.parametrize("mode", ["in_place", "staged"])


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(
            checkpoint, Path(folder), wait=False, environment=on_devices(0), **ENGINE
        ) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.fixture
def policy(service: Service, checkpoint: Path) -> Iterator[Any]:
    """Makes trainers' models on the second GPU; at the end the checkpoint is restored."""
    made: list[PolicyWeights] = []
    with closing(InferenceClient(service.address)) as client:

        def make(dtype: torch.dtype, mode: str, *, sparse: bool = False) -> tuple[Any, PolicyWeights]:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to("cuda:1")
            how = {"mode": mode, "timeout_s": 60, "sparse": sparse}
            made.append(PolicyWeights(client, lambda: model, transport="nccl", **how))  # type: ignore[arg-type]
            return model, made[-1]

        yield make
        for weights in made:
            weights.detach()
        service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(5, 200, (2, 16), device="cuda:1")
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["mirror", "buckets"])
def test_each_update_is_the_trainers_to_the_bit(
    service: Service, policy: Any, dtype: torch.dtype, mode: str
) -> None:
    model, weights = policy(dtype, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = digest(service)[1]
    for _ in range(5):
        step(model, optimizer)
        weights.sync()
        assert (weights.transport, weights.aliased) == ("nccl", False)
        assert digest(service) == (weights.weight_version, digest_of(model, service))
        assert digest(service)[1] != before
    assert weights.bytes_moved == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert_agrees(service, model.to("cuda:0"))
    model.to("cuda:1")


def change(model: Any, share: float) -> int:
    """Other bits in that share of the elements. Returns how many elements those are."""
    count = 0
    for parameter in model.parameters():
        flat = bits(parameter)
        where = (torch.rand(flat.shape, device=flat.device) < share).nonzero().view(-1)
        flat[where] ^= torch.randint(1, 4, where.shape, device=flat.device).to(flat.dtype)
        count += len(where)
    return count


@MODES
def test_changes_alone_are_the_trainers_to_the_bit(service: Service, policy: Any, mode: str) -> None:
    model, weights = policy(torch.bfloat16, mode, sparse=True)
    dense = 2 * sum(parameter.numel() for parameter in model.parameters())
    weights.sync()
    assert (weights.history[-1].changed, weights.bytes_moved) == (None, dense)
    for share in (0.01, 0.01, 0.0, 0.02, 0.15, 0.15, 0.6, 0.01, 0.01, 0.001):
        count = change(model, share)
        weights.sync()
        assert weights.history[-1].changed == count
        assert digest(service) == (weights.weight_version, digest_of(model, service))
    assert weights.bytes_moved < dense / 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    for _ in range(3):
        step(model, optimizer)
        weights.sync()
        assert weights.history[-1].changed is not None
        assert digest(service) == (weights.weight_version, digest_of(model, service))
    assert_agrees(service, model.to("cuda:0"))
    model.to("cuda:1")


@MODES
def test_after_an_update_that_failed_everything_travels(
    service: Service, policy: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = policy(torch.bfloat16, mode, sparse=True)
    weights.sync()
    change(model, 0.01)
    wait, broken = nccl.Communicator.wait, []

    def breaks(self: nccl.Communicator, *of: Any) -> None:
        if not broken:
            broken.append(self)
            raise nccl.NcclError("broken")
        wait(self, *of)

    monkeypatch.setattr(nccl.Communicator, "wait", breaks)
    weights.sync()  # is tried again
    assert broken
    assert weights.history[-1].changed is None
    assert digest(service)[1] == digest_of(model, service)
    count = change(model, 0.01)
    weights.sync()
    assert weights.history[-1].changed == count
    assert digest(service)[1] == digest_of(model, service)


def test_nothing_travels_on_the_engines_own_gpu(service: Service, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to("cuda:0")
    with closing(InferenceClient(service.address)) as client:
        with pytest.raises(TandemError) as refused:
            PolicyWeights(client, lambda: model, transport="nccl").sync()
    assert refused.value.reason == Reason.TRANSPORT_UNAVAILABLE
    assert "engine's GPU" in refused.value.message


@MODES
def test_rollouts_go_on_over_updates(service: Service, policy: Any, mode: str) -> None:
    model, weights = policy(torch.bfloat16, mode)
    weights.sync()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=[5 + i, 6, 7])) for i in range(8)],
        sampling=pb.SamplingParams(max_tokens=200, temperature=1, ignore_eos=True),
    )
    rollouts: list[pb.Rollout] = []

    def generate() -> None:
        for message in service.inference.Generate(request, timeout=120):
            rollouts.extend(message.rollouts)

    generating = threading.Thread(target=generate)
    generating.start()
    while generating.is_alive():
        step(model, optimizer)
        weights.sync()
    generating.join()
    assert sorted(r.prompt_index for r in rollouts) == list(range(8))
    versions = [[span.weight_version for span in r.version_spans] for r in rollouts]
    assert all(len(r.token_ids) == sum(s.num_tokens for s in r.version_spans) == 200 for r in rollouts)
    assert all(mine == sorted(mine) for mine in versions)
    assert max(map(len, versions)) > 1, "updates came in the middle"
    assert digest(service)[1] == digest_of(model, service)


STOPS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from trainer_service.client import InferenceClient
from trainer_service.lease import Lease
from trainer_service.weights import PolicyWeights
from trainer_service.lease import Lease
from weight_transfer.cuda import nccl
address, path, mode, where = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to("cuda:1")
every = {"sending changes": 100, "sending whole": 2}.get(where, 1)
sparse = every > 1
weights = PolicyWeights(InferenceClient(address), lambda: model, transport="nccl", mode=mode, sparse=sparse)
weights.sync()
def stop(*_):
    print(where, flush=True)
    time.sleep(600)
if where == "joining":
    weights._session.transport.leave()
    nccl._core.Communicator = stop
if where == "ahead":
    transport = weights._session.transport
    ahead = transport.ahead
    def sent():
        ahead()
        time.sleep(0.5)
        stop()
    transport.ahead = sent
if where == "ready":
    weights._session.transport._connected = False  # nothing goes ahead
    nccl.Communicator.broadcast = stop
if where == "sending":
    Lease.send = stop  # all is on its way, and the commit is not
if sparse:
    nccl.Communicator.wait = stop
for parameter in model.parameters():
    parameter.data.view(-1)[::every].add_(1)
weights.sync()
"""


@contextmanager
def stopped_trainer(
    service: Service, checkpoint: Path, mode: str, where: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", STOPS, service.address, str(checkpoint), mode, where]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    ) as trainer:
        assert trainer.stdout is not None
        late = threading.Timer(120, trainer.kill)
        late.start()
        try:
            assert where in trainer.stdout.readline()
            late.cancel()
            yield trainer
        finally:
            late.cancel()
            trainer.kill()


def state(service: Service) -> Any:
    return service.weights.GetWeightVersion(weights_pb2.GetWeightVersionRequest(), timeout=10)


def until(done: Callable[[], bool], seconds: float) -> float:
    start = time.monotonic()
    while not done():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return time.monotonic() - start


@MODES
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize(
    "where", ["joining", "ahead", "ready", "sending", "sending changes", "sending whole"]
)
def test_a_trainer_that_goes_away_leaves_the_old_version_or_nothing(
    service: Service, policy: Any, checkpoint: Path, mode: str, kind: signal.Signals, where: str
) -> None:
    with stopped_trainer(service, checkpoint, mode, where) as trainer:
        before = state(service).weight_version
        trainer.send_signal(kind)
        failed = until(lambda: state(service).state not in (_STAGING, _WRITING), 5)
        assert failed < 3, "2 s of silence, and what it takes to see that"
    after = state(service)
    assert after.weight_version == before
    torn = mode == "in_place" and where != "joining"
    assert after.state == (weights_pb2.WEIGHT_STATE_TORN if torn else weights_pb2.WEIGHT_STATE_COMMITTED)
    assert service.health() == ("NOT_SERVING" if torn else "SERVING")
    model, weights = policy(torch.bfloat16, mode)
    weights.sync()  # heals, with a communicator of its own, and without a restart of anything
    service.wait_until("SERVING", 10)
    assert digest(service)[1] == digest_of(model, service)


_STAGING, _WRITING = weights_pb2.WEIGHT_STATE_STAGING, weights_pb2.WEIGHT_STATE_WRITING


@MODES
@pytest.mark.parametrize("who", ["engine", "service"])
def test_who_stands_still_is_given_up_and_comes_back(
    service: Service, policy: Any, mode: str, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = policy(torch.bfloat16, mode)
    weights.sync()
    given_up, recover = [], weights._recover

    def recovers(*arguments: Any) -> None:
        given_up.append(time.monotonic() - stopped)
        recover(*arguments)

    monkeypatch.setattr(weights, "_recover", recovers)
    (engine,) = [p for p in service.children() if b"EngineCore" in Path(f"/proc/{p}/cmdline").read_bytes()]
    stands = engine if who == "engine" else service.process.pid
    os.kill(stands, signal.SIGSTOP)
    stopped = time.monotonic()
    wakes = threading.Timer(4, os.kill, (stands, signal.SIGCONT))
    wakes.start()
    try:
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        weights.sync()  # is tried again once it is there
    finally:
        wakes.join()
        os.kill(stands, signal.SIGCONT)
    assert given_up
    assert given_up[0] < 3.5, "while it stands still: silence is noticed after 2 s"
    assert digest(service)[1] == digest_of(model, service)


@MODES
def test_bytes_that_are_not_the_trainers_are_refused(
    service: Service, policy: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = policy(torch.bfloat16, mode)
    weights.sync()
    before = state(service).weight_version
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    send = Lease.send
    monkeypatch.setattr(
        Lease,
        "send",
        lambda lease, piece: send(lease, Sum(piece.digest ^ 1) if isinstance(piece, Sum) else piece),
    )
    with pytest.raises(TandemError) as refused:
        weights.sync()
    assert refused.value.reason == Reason.DIGEST_MISMATCH
    after, torn = state(service), mode == "in_place"
    assert after.weight_version == before
    assert after.state == (weights_pb2.WEIGHT_STATE_TORN if torn else weights_pb2.WEIGHT_STATE_COMMITTED)
    assert service.health() == ("NOT_SERVING" if torn else "SERVING")
    monkeypatch.undo()
    weights.sync()
    service.wait_until("SERVING", 10)
    assert digest(service)[1] == digest_of(model, service)


def test_two_trainers_take_turns(service: Service, policy: Any) -> None:
    """Each has a session of its own; a communicator is given up when the other joins."""
    one, first = policy(torch.bfloat16, "staged")
    first.sync()
    other, second = policy(torch.bfloat16, "staged")
    second.sync()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(TandemError) as taken:
        first.sync()
    assert taken.value.reason == Reason.BASE_VERSION_MISMATCH
    second.sync()
    assert digest(service)[1] == digest_of(other, service) != digest_of(one, service)


@pytest.mark.alone
def test_memory_comes_back(service: Service, policy: Any) -> None:
    """Fifteen sessions leave no device memory on either side."""
    model, weights = policy(torch.bfloat16, "staged")
    held: list[tuple[int, int]] = []
    for _ in range(15):
        weights.sync()
        weights.detach()
        torch.cuda.empty_cache()
        held.append(tuple(sum(torch.cuda.mem_get_info(i)[0:1]) for i in (0, 1)))  # type: ignore[arg-type]
    for device in (0, 1):
        assert held[5][device] - held[-1][device] < 64 << 20, held
    assert digest(service)[1] == digest_of(model, service)
