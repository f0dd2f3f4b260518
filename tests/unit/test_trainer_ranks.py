"""Two ranks of one run, over a service that is killed and comes back. Generation is told, everything else real."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from tests.ranks import ON_CPU, of_script, succeeded, two_ranks
from tests.weight_service import WeightService
from trainer_service.client import InferenceClient

RANK = """
    import sys, time
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from tandem.errors import Reason, Unavailable
    from trainer_service.ranks import OtherRankError
    from tandem.inference.v1 import inference_pb2 as pb
    from tests.weight_service import network
    from trainer_service.client import InferenceClient
    from trainer_service.generation import RemoteGeneration
    from trainer_service.weights import PolicyWeights

    address, folder = sys.argv[1], Path(sys.argv[2])

    class Client(InferenceClient):
        def generate(self, groups, sampling, logprobs, **_):
            version = self.get_model().weight_version
            if version == 1:
                (folder / "seen").touch()
            spans = [pb.VersionSpan(weight_version=version, num_tokens=1)]
            return [[pb.Rollout(token_ids=[version], logprobs=[0], version_spans=spans)] * g.n for g in groups]

    def wait_for(name):
        while not (folder / name).exists():
            time.sleep(0.02)

    def versions():
        return generation.generate([[1], [2]], None, 1)[1]

    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), network()
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    client = Client(address)
    weights = PolicyWeights(client, lambda: model, transport="shared", timeout_s=30) if rank == 0 else None
    generation = RemoteGeneration(None, accelerator, None, client=client, weights=weights, server_timeout=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    generation.sync_weights()
    step()
    generation.sync_weights()
    assert versions() == [[3], [3]]
    (folder / f"generated{rank}").touch()
    wait_for("restarted")
    if rank == 0:
        wait_for("seen")  # the other one has met the new engine, which has the checkpoint's weights
    assert versions() == [[3], [3]]
    accelerator.wait_for_everyone()  # as trainers do, who gather what was generated
    step()
    generation.sync_weights()
    assert versions() == [[4], [4]]

    if rank == 0:
        def gone():
            raise Unavailable(Reason.UNREACHABLE, "no engine")
        weights.sync = gone
    try:
        generation.sync_weights()
    except Unavailable as error:  # which passes, on every rank
        assert error.reason is Reason.UNREACHABLE
        assert error.message == ("no engine", "The main process could not sync: no engine")[rank]
    else:
        raise AssertionError("a failed sync is an error on every rank")

    if rank == 0:
        def fail():
            raise ValueError("no r\\u00f6om")
        weights.sync = fail
    try:
        generation.sync_weights()
    except ValueError as error:
        assert rank == 0
    except OtherRankError as error:
        assert rank == 1
        assert str(error) == "The main process could not sync: ValueError: no r\\u00f6om"
    else:
        raise AssertionError("a failed sync is an error on every rank")
    if weights is not None:
        weights.detach()
    client.close()
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which aborts
"""


@pytest.fixture
def folder() -> Path:
    with tempfile.TemporaryDirectory(prefix="tdm") as name:
        yield Path(name)


def test_a_run_goes_on_with_a_service_that_was_killed_while_ranks_generate(folder: Path) -> None:
    service = WeightService(f"unix://{folder}/s", 2.0)
    service.start()
    try:
        with two_ranks(*of_script(RANK, service.address, folder), **ON_CPU) as ranks:
            end = time.monotonic() + 90
            while not all((folder / f"generated{rank}").exists() for rank in range(2)):
                assert time.monotonic() < end
                assert all(rank.poll() is None for rank in ranks), [
                    rank.communicate()[0][-3000:] for rank in ranks if rank.poll() is not None
                ]
                time.sleep(0.05)
            service.kill()
            service.start()
            client = InferenceClient(service.address)
            client.wait_until_serving(30)
            client.close()
            (folder / "restarted").touch()
            succeeded(ranks, 60)
    finally:
        service.kill()
