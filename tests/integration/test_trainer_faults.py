"""Training over a real engine that dies, a trainer that stalls, and several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tandem.weights.v1 import weights_pb2 as pb
from tests.ranks import ON_CPU, of_script, succeeded, two_ranks
from tests.services import ENVIRONMENT, Service, inference_service
from tests.trainers import assert_same_bits, make, model_of

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path]) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoints["llama"], Path(folder)) as service,
    ):
        yield service


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_training_goes_on_after_kill_9_of_the_service(
    checkpoints: dict[str, Path], socket_folder: Path, tmp_path: Path, mode: str
) -> None:
    with ExitStack() as lives:

        def start(wait: bool) -> Service:
            return lives.enter_context(inference_service(checkpoints["llama"], socket_folder, wait=wait))

        services = [start(wait=True)]

        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 2:
                    services[0].process.kill()
                    services[0].process.wait()
                    services.append(start(wait=False))  # as a supervisor does

        model = model_of(checkpoints["llama"], torch.bfloat16)
        trainer = make(
            "grpo",
            services[0],
            model,
            tmp_path,
            vllm_mode=mode,
            max_steps=4,
            callbacks=[Kill()],
            vllm_server_timeout=240,
        )
        trainer.train()
        assert trainer.state.global_step == 4
        assert trainer.policy_weights.aliased == (mode == "colocate")
        engine_ids = {trainer.policy_weights.engine_id}
        trainer.vllm_generation.sync_weights()
        assert_same_bits(services[1], model)
        assert engine_ids == {trainer.policy_weights.engine_id}
        trainer.close()


STUCK = """
import sys, time, torch
from tests.trainers import arguments, model_of, prompts, reward
from tests import models
from trainer_service.trainers import GRPOTrainer

class Stuck(torch.optim.SGD):
    def step(self, closure=None):
        self.param_groups[0]["params"][0].data.fill_(float("nan"))
        print("stuck", flush=True)
        time.sleep(120)

model = model_of(sys.argv[1], torch.bfloat16)
trainer = GRPOTrainer(
    model, reward, arguments("grpo", sys.argv[2]), prompts(), processing_class=models.tokenizer(),
    inference_address=sys.argv[3], optimizers=(Stuck(model.parameters(), lr=0.1), None),
)
trainer.train()
"""


@pytest.mark.slow
def test_a_trainer_that_is_killed_in_its_step_is_followed_by_another(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """It leaves the engine torn, which heals with what the next one brings."""
    command = [sys.executable, "-c", STUCK, str(checkpoints["llama"]), str(tmp_path / "a"), service.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT) as first:
        assert first.stdout is not None
        assert any("stuck" in line for line in first.stdout)
        first.kill()
    service.wait_until("NOT_SERVING", 10)
    model = model_of(checkpoints["llama"], torch.bfloat16)
    trainer = make("grpo", service, model, tmp_path / "b", vllm_server_timeout=20)
    trainer.train()
    assert service.health() == "SERVING"
    assert_same_bits(service, model)
    trainer.close()


def test_a_trainer_that_stalls_in_a_step_loses_its_lease_and_makes_up_for_it(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    import ctypes

    held = ctypes.PyDLL(None)  # its calls keep the interpreter's lock: no thread of ours can send a heartbeat
    states: list[int] = []

    class Stalling(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            if not states:
                held.usleep(4_500_000)
                now = service.weights.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=10)
                states.append(now.state)
            return result

    model = model_of(checkpoints["llama"], torch.bfloat16)
    optimizer = Stalling(model.parameters(), lr=0.1)
    trainer = make("grpo", service, model, tmp_path, max_steps=3, optimizers=(optimizer, None))
    trainer.train()
    assert states == [pb.WEIGHT_STATE_TORN]
    assert trainer.state.global_step == 3
    assert_same_bits(service, model)
    trainer.close()


RANK = """
    import json, os, sys
    import torch
    from accelerate.utils import gather_object
    from pathlib import Path
    from types import SimpleNamespace
    from tests.trainers import make, model_of

    address, checkpoint, folder, mode = sys.argv[1:]
    model = model_of(Path(checkpoint), torch.bfloat16)
    trainer = make("grpo", SimpleNamespace(address=address), model, Path(folder), vllm_mode=mode,
                   per_device_train_batch_size=4, ddp_backend="gloo", ddp_find_unused_parameters=False)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    rank = trainer.accelerator.process_index
    assert (trainer.policy_weights is not None) == (rank == 0)
    trainer.vllm_generation.sync_weights()
    # As in a tool loop: ranks call as often as they need, with as many rows as they need.
    rows = [[10, 20, 30], [40, 50], [60, 70, 80], [90]]
    turns = [[rows[2], rows[3]]]
    if rank == 0:
        turns = [[rows[0]], [rows[1], rows[2]], [rows[3], rows[0], rows[1]]]
    generation, answers = trainer.vllm_generation, []
    for turn in turns:
        _, completions, logprobs, _ = generation.generate(turn, None, 1)
        answers += zip(turn, completions, [[at[0] for at in row] for row in logprobs], strict=True)
    # Then everybody meets again.
    everybody = gather_object([answers])
    assert [len(answers) for answers in everybody] == [6, 2]
    for row, completion, logprobs in answers:
        (score,) = generation.client.score([row + completion])
        off = max(abs(a - b) for a, b in zip(score.logprobs[len(row) - 1:], logprobs, strict=True))
        assert off < 0.2, f"sampled from another prompt than {row}"
    weights = [value for value in gather_object([sum(p.double().sum().item() for p in model.parameters())])]
    assert weights[0] == weights[1]
    print("VERSION", trainer.vllm_generation._version)
    trainer.close()
"""


def assert_same_version_at_the_end(ranks: list[subprocess.Popen[str]]) -> None:
    lines = [line for output in succeeded(ranks, 400) for line in output.splitlines()]
    assert len({line for line in lines if line.startswith("VERSION")}) == 1, (
        "all know the version that was synced"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_two_ranks_train_and_call_as_they_like(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    with two_ranks(
        *of_script(RANK, service.address, checkpoints["llama"], tmp_path, mode), **ON_CPU
    ) as ranks:
        assert_same_version_at_the_end(ranks)


RANK_THAT_WAITS = """
    import sys, time
    import torch
    from pathlib import Path
    from types import SimpleNamespace
    from tests.trainers import make, model_of

    address, checkpoint, folder, mode = sys.argv[1:]
    trainer = make("grpo", SimpleNamespace(address=address), model_of(Path(checkpoint), torch.bfloat16),
                   Path(folder), vllm_mode=mode, max_steps=4, per_device_train_batch_size=4,
                   ddp_backend="gloo", ddp_find_unused_parameters=False, vllm_server_timeout=240)
    client, rank = trainer.vllm_generation.client, trainer.accelerator.process_index
    generate, calls = client.generate, []

    def wait(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            Path(folder, f"generates{rank}").touch()
            while not Path(folder, "killed").exists():
                time.sleep(0.02)
        return generate(*args, **kwargs)

    client.generate = wait
    trainer.train()
    assert trainer.state.global_step == 4
    trainer.vllm_generation.sync_weights()
    print("VERSION", trainer.vllm_generation._version)
    trainer.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_two_ranks_go_on_after_kill_9_of_the_service_while_they_generate(
    checkpoints: dict[str, Path], socket_folder: Path, tmp_path: Path, mode: str
) -> None:
    with ExitStack() as lives:
        first = lives.enter_context(inference_service(checkpoints["llama"], socket_folder))
        with two_ranks(
            *of_script(RANK_THAT_WAITS, first.address, checkpoints["llama"], tmp_path, mode), **ON_CPU
        ) as ranks:
            end = time.monotonic() + 240
            while not all((tmp_path / f"generates{rank}").exists() for rank in range(2)):
                assert time.monotonic() < end
                assert all(rank.poll() is None for rank in ranks)
                time.sleep(0.05)
            first.process.kill()
            first.process.wait()
            lives.enter_context(inference_service(checkpoints["llama"], socket_folder, wait=False))
            (tmp_path / "killed").touch()
            assert_same_version_at_the_end(ranks)


def test_a_failed_sync_is_an_error_on_every_rank(
    service: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    # One process: the error itself. What the others are told is broadcast with it.
    trainer = make(
        "grpo", service, model_of(checkpoints["llama"], torch.float32), tmp_path, vllm_mode="server"
    )
    quantized = torch.zeros(128, dtype=torch.uint8)
    trainer.model.model.norm.weight = torch.nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight is quantized"):
        trainer.train()
    trainer.close()
