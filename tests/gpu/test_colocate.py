"""A trainer and an engine on one CUDA device hold one copy of the weights."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.engine.v1 import engine_pb2
from tandem.errors import Reason, TandemError
from tandem.inference.v1 import inference_pb2 as pb
from tandem.rpc import translated
from tandem.weights.v1 import weights_pb2
from tests.gpu.engines import ENGINE
from tests.services import ENVIRONMENT, Service, inference_service
from trainer_service.client import InferenceClient
from trainer_service.policy_tensors import policy_tensors
from trainer_service.room import Room
from trainer_service.weights import PolicyWeights
from weight_transfer.digest import combine, digest_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 6, 7, 8], [40, 41, 42], [200, 100, 50, 25, 12]]
#: Of SGD. One step at it changes some logprobs by more than 2; one at 0.01 by as much as bfloat16's rounding does.
RATE = 0.3


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    engine = ENGINE | {"kv_cache_memory_bytes": 4 << 30, "enable_sleep_mode": True}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        with inference_service(checkpoint, Path(folder), wait=False, **engine) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.fixture
def policy(service: Service, checkpoint: Path) -> Iterator[Any]:
    """Makes trainers' models, with weights that follow the engine; at the end the checkpoint is restored."""
    made: list[PolicyWeights] = []
    with closing(InferenceClient(service.address)) as client:

        def make(dtype: torch.dtype, transport: str | None = None) -> tuple[Any, PolicyWeights]:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).cuda()
            made.append(PolicyWeights(client, lambda: model, transport=transport))
            return model, made[-1]

        yield make
        for weights in made:
            weights.detach()
        service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(5, 200, (2, 16), device="cuda")
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def digest(service: Service) -> tuple[int, int]:
    request = weights_pb2.GetWeightVersionRequest(include_digest=True)
    answer = service.weights.GetWeightVersion(request, timeout=60)
    assert answer.state == weights_pb2.WEIGHT_STATE_COMMITTED
    return answer.weight_version, answer.digest


def digest_of(model: Any, service: Service) -> int:
    manifest = service.weights.GetManifest(weights_pb2.GetManifestRequest(), timeout=60).manifest
    names = [tensor.name for tensor in manifest.tensors]
    found = {source.name: source.read() for source in policy_tensors(model, names)}
    return combine(digest_tensors([found[name].bfloat16() for name in names]))


def assert_agrees(service: Service, model: Any, noise: float = 0.15) -> None:
    """Rollouts have the logprobs that the trainer's model gives them."""
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=ids)) for ids in PROMPTS],
        sampling=pb.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True),
    )
    rollouts = [r for message in service.inference.Generate(request, timeout=120) for r in message.rollouts]
    for rollout in rollouts:
        ids = PROMPTS[rollout.prompt_index]
        tokens = torch.tensor([ids + list(rollout.token_ids)], device="cuda")
        with torch.no_grad():
            logprobs = model(tokens).logits[0].float().log_softmax(-1)
        mine = [logprobs[i - 1, tokens[0, i]].item() for i in range(len(ids), tokens.shape[1])]
        assert mine == pytest.approx(list(rollout.logprobs), abs=noise)


def test_steps_write_the_engines_memory(service: Service, policy: Any) -> None:
    model, weights = policy(torch.bfloat16)
    weights.sync()
    assert (weights.transport, weights.aliased) == ("shared", True)
    assert digest(service)[1] == digest_of(model, service)
    old = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(5):
        before, version = digest(service)[1], weights.weight_version
        step(model, optimizer)
        weights.sync()
        assert (weights.bytes_moved, weights.weight_version) == (0, version + 1)
        assert digest(service) == (version + 1, digest_of(model, service)) != (version + 1, before)
    assert_agrees(service, model)
    with pytest.raises(AssertionError):
        assert_agrees(service, old)


def test_the_second_copy_goes(service: Service, policy: Any) -> None:
    """Until the parameters are the engine's memory they are the trainer's own."""
    model, weights = policy(torch.bfloat16)
    held = torch.cuda.memory_allocated()
    nbytes = sum(p.nbytes for p in model.parameters())
    weights.sync()
    assert held - torch.cuda.memory_allocated() >= 0.99 * nbytes, "but for tables of where they lie"
    kept = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == kept, "nor does torch keep it"
    weights.detach()
    assert torch.cuda.memory_allocated() >= held
    assert digest(service)[1] == digest_of(model, service)


@pytest.mark.parametrize(("dtype", "transport"), [(torch.float32, None), (torch.bfloat16, "stream")])
def test_what_cannot_alias_is_written(
    service: Service, policy: Any, dtype: torch.dtype, transport: str | None
) -> None:
    model, weights = policy(dtype, transport)
    old = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(3):
        step(model, optimizer)
        weights.sync()
        assert not weights.aliased
        assert weights.bytes_moved > 0
        assert digest(service)[1] == digest_of(model, service)
    assert_agrees(service, model)
    with pytest.raises(AssertionError):
        assert_agrees(service, old)


def test_updates_of_a_sleeping_engine_are_there_when_it_wakes(service: Service, policy: Any) -> None:
    model, weights = policy(torch.bfloat16)
    weights.sync()
    free = torch.cuda.mem_get_info()[0]
    told = service.engine.Sleep(engine_pb2.SleepRequest(), timeout=60).released_bytes
    freed = torch.cuda.mem_get_info()[0] - free
    assert abs(told - freed) < 64 << 20, "others may have taken or freed some"
    assert freed > 2 << 30, "the KV cache is given back"
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(3):  # of which each is a version, as with gradient accumulation in between
        step(model, optimizer)
    weights.sync()
    assert weights.bytes_moved == 0
    service.engine.WakeUp(engine_pb2.WakeUpRequest(), timeout=60)
    assert digest(service)[1] == digest_of(model, service)
    assert_agrees(service, model)


def test_an_engine_that_wakes_finds_its_memory_again_that_training_had(service: Service, policy: Any) -> None:
    model, weights = policy(torch.bfloat16)
    weights.sync()
    rank = SimpleNamespace(device=torch.device("cuda"), is_main_process=True)
    with closing(InferenceClient(service.address)) as client:
        room = Room(client, rank, shared=True)
        room.free()
        training = torch.empty(torch.cuda.mem_get_info()[0] - (64 << 20), dtype=torch.uint8, device="cuda")
        del training  # to torch's allocator, which keeps it
        assert torch.cuda.mem_get_info()[0] < 128 << 20
        room.make()
        client.wake_up()
    assert_agrees(service, model)


DIES = """
import os, sys, torch
from transformers import AutoModelForCausalLM
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16).cuda()
weights = PolicyWeights(InferenceClient(sys.argv[1]), lambda: model)
weights.sync()
with weights.update():
    next(model.parameters()).data.fill_(float("nan"))
    torch.cuda.synchronize()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_trainer_that_dies_in_its_lease_tears_the_engine_and_another_heals_it(
    service: Service, policy: Any, checkpoint: Path
) -> None:
    command = [sys.executable, "-c", DIES, service.address, str(checkpoint)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    ) as trainer:
        assert trainer.stdout is not None
        assert "writing" in trainer.stdout.readline()
        trainer.send_signal(signal.SIGKILL)
    died = time.monotonic()
    service.wait_until("NOT_SERVING", 10)
    assert time.monotonic() - died < 3
    request = pb.GenerateRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=[5, 6]))])
    with pytest.raises(TandemError) as torn, translated():
        list(service.inference.Generate(request, timeout=30))
    assert torn.value.reason == Reason.ENGINE_TORN
    model, weights = policy(torch.bfloat16)
    weights.sync()
    service.wait_until("SERVING", 10)
    assert digest(service)[1] == digest_of(model, service)
    assert_agrees(service, model)


EXPANDS = """
import sys, torch
from transformers import AutoModelForCausalLM
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16).cuda()
assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()), "the setting is not in force"
weights = PolicyWeights(InferenceClient(sys.argv[1]), lambda: model)
weights.sync()
assert (weights.transport, weights.aliased) == ("shared", True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    ids = torch.randint(5, 200, (2, 16), device="cuda")
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    weights.sync()
    assert weights.bytes_moved == 0
version, held = weights.weight_version, [p.clone() for p in model.parameters()]
weights.detach()
assert all(map(torch.equal, held, model.parameters()))
model(ids, labels=ids).loss.backward()  # in memory of its own
optimizer.step()
torch.cuda.synchronize()
print("version", version, flush=True)
"""


def test_a_trainer_whose_segments_expand(service: Service, policy: Any, checkpoint: Path) -> None:
    """The memory of torch's allocator is never shared, so that it may be of any kind."""
    expands = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    done = subprocess.run(
        [sys.executable, "-c", EXPANDS, service.address, str(checkpoint)],
        env=os.environ | ENVIRONMENT | expands,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"version {digest(service)[0]}"
    model, weights = policy(torch.bfloat16)  # the next trainer, of the usual kind
    weights.sync()
    assert digest(service)[1] == digest_of(model, service)
