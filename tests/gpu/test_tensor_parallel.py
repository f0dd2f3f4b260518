"""An engine on two GPUs, and a trainer of two ranks on the same two: each rank writes its own GPU's memory."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.errors import Reason, TandemError
from tandem.weights.v1 import weights_pb2
from tests.gpu.engines import ENGINE
from tests.gpu.test_colocate import digest, digest_of
from tests.ranks import of_script, succeeded, two_ranks
from tests.services import Service, inference_service, on_devices
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights
from weight_transfer.cuda.devices import uuid_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[Service]:
    engine = ENGINE | {"tensor_parallel_size": 2, "distributed_executor_backend": '"mp"'}
    with tempfile.TemporaryDirectory(prefix="tdm") as folder:
        environment = on_devices(0, 1)
        with inference_service(
            checkpoint, Path(folder), wait=False, environment=environment, **engine
        ) as service:
            service.wait_until("SERVING", 240)
            yield service


@pytest.fixture(autouse=True)
def _restored(service: Service) -> Iterator[None]:
    yield
    service.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=60)
    service.wait_until("SERVING", 10)


def test_what_two_gpus_hold_is_the_checkpoint(service: Service, checkpoint: Path) -> None:
    """Each worker's sums, from its own GPU's kernel, make the digest of the whole."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert digest(service)[1] == digest_of(model, service)


def test_a_stream_reaches_both(service: Service, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with closing(InferenceClient(service.address)) as client:
        weights = PolicyWeights(client, lambda: model, transport="stream")
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        weights.sync()
        assert digest(service) == (weights.weight_version, digest_of(model, service))
        weights.detach()


def test_a_trainer_on_one_of_them_is_told_which_are_missing(service: Service, checkpoint: Path) -> None:
    first, second = (uuid_of(torch.device("cuda", i)) for i in range(2))
    for device, other in (("cuda:0", second), ("cuda:1", first)):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(device)
        with closing(InferenceClient(service.address)) as client:
            with pytest.raises(TandemError) as refused:
                PolicyWeights(client, lambda model=model: model, transport="shared").sync()
        assert refused.value.reason == Reason.TRANSPORT_UNAVAILABLE
        assert other in refused.value.message
        assert [violation.field for violation in refused.value.violations] == ["identity.gpu_uuids"]


WRITES = """
    import sys, time
    from types import SimpleNamespace
    import torch
    from accelerate import Accelerator
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from tandem.inference.v1.inference_pb2_grpc import InferenceServiceStub
    from tandem.rpc import connect
    from tests.gpu.test_colocate import assert_agrees
    from tests.sharded_run import assert_same_bits
    from tests.split_service import Rank

    address, checkpoint, how, dtype = sys.argv[1:]
    device = Accelerator().device
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device)
    if how == "fsdp2":
        mesh = init_device_mesh("cuda", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    rank = Rank(address, model, cpu=False)
    whole, gathered = DTensor.full_tensor, []

    def full_tensor(tensor, *args, **kwargs):
        gathered.append(tuple(tensor.shape))
        return whole(tensor, *args, **kwargs)

    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        gathered.clear()
        DTensor.full_tensor = full_tensor
        began = time.perf_counter()
        rank.sync()
        took = time.perf_counter() - began
        DTensor.full_tensor = whole
        assert_same_bits(address, model)
        if how == "ddp":
            assert gathered == []
        else:
            layers = model.model.layers
            own = [p for n, p in model.named_parameters() if n.split(".")[-2] in
                   ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")]
            assert own and 0 < len(gathered) <= len(list(model.parameters())) - len(own), gathered
        print("SYNC", how, dtype, round(took * 1e3, 1), flush=True)
    part = rank.together._shared.part
    (arena,) = part._arenas
    assert arena.device == device, "a rank maps its own GPU's memory, and no other"
    if rank.number == 0:
        assert (rank.weights.transport, rank.weights.aliased) == ("shared", False)
        assert "" not in rank.weights._session.alias_reasons.values()
        if how == "ddp" and dtype == "bfloat16":
            with connect(address) as channel:
                assert_agrees(SimpleNamespace(inference=InferenceServiceStub(channel)), model)
    rank.accelerator.wait_for_everyone()
    rank.close()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_each_rank_writes_its_own_gpu(service: Service, checkpoint: Path, how: str, dtype: str) -> None:
    before = digest(service)[1]
    with two_ranks(*of_script(WRITES, service.address, checkpoint, how, dtype), **OFFLINE) as ranks:
        for output in succeeded(ranks):
            assert output.count("SYNC") == 5
    assert digest(service)[1] != before


DIES = """
    import os, signal, sys
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM
    from tests.split_service import Rank

    address, checkpoint = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(Accelerator().device)
    rank = Rank(address, model, cpu=False)
    rank.sync()
    part = rank.together._shared.part
    write = part.write

    def dies(values):
        write(dict(list(values.items())[:5]))
        print("DIES", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank.number == 1:
        part.write = dies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    try:
        rank.sync()
    except Exception as error:
        print("RAISED", error, flush=True)
        os._exit(0)
"""


def test_a_rank_that_is_killed_as_it_writes_tears_the_engine(service: Service, checkpoint: Path) -> None:
    with two_ranks(*of_script(DIES, service.address, checkpoint), **OFFLINE) as ranks:
        assert ranks[1].stdout is not None
        while "DIES" not in ranks[1].stdout.readline():
            assert ranks[1].poll() is None
        assert ranks[1].wait(10) == -signal.SIGKILL
        died = time.monotonic()
        request = weights_pb2.GetWeightVersionRequest()
        while service.weights.GetWeightVersion(request, timeout=10).state != weights_pb2.WEIGHT_STATE_TORN:
            assert time.monotonic() - died < 2
            time.sleep(0.02)
        assert service.health() == "NOT_SERVING"
        ranks[0].communicate(timeout=60)
        ranks[1].stdout.close()
    command = of_script(WRITES, service.address, checkpoint, "ddp", "bfloat16")
    with two_ranks(*command, **OFFLINE) as ranks:  # heals
        succeeded(ranks)
    service.wait_until("SERVING", 10)
