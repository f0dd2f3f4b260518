"""A reward that fails on one rank ends every rank, with its reason: none waits for it in a collective."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.weights.v1 import weights_pb2 as pb
from tests.ranks import ON_CPU, of_script, succeeded, two_ranks
from tests.services import Service

RANK = """
    import sys
    import torch
    from pathlib import Path
    from types import SimpleNamespace
    from tandem.errors import InvalidArgument, Reason, TandemError, Unavailable
    from tests import models, trainers
    from tests.golden import trl_1_13 as golden
    from tests.integration.test_trainer_pairs import KINDS
    from trainer_service.ranks import OtherRankError

    address, checkpoint, folder = sys.argv[1:]
    mine, calls, error = None, [], None

    def score(completion_ids, **_):
        calls.append(1)
        if mine == 1 and len(calls) == 2:
            raise error
        return [len(set(ids)) + 0.01 * (sum(ids) % 97) for ids in completion_ids]

    async def awaited(**given):
        return score(**given)

    def make(kind, reward):
        model = trainers.model_of(Path(checkpoint), torch.float32)
        if kind in ("grpo", "rloo"):
            args = trainers.arguments(kind, Path(folder), vllm_mode="server", max_steps=4,
                                      per_device_train_batch_size=4, ddp_backend="gloo")
            cls = getattr(trainers.trainers, kind.upper() + "Trainer")
            return cls(model, reward, args, trainers.prompts(), processing_class=models.tokenizer(),
                       inference_address=address)
        cls, config = KINDS[kind]
        settings = golden.SETTINGS | {"max_steps": 4, "save_strategy": "no", "vllm_mode": "server",
                                     "disable_tqdm": True}
        reference = trainers.model_of(Path(checkpoint), torch.float32)
        return cls(model, reference, reward, config(folder, **settings), train_dataset=trainers.prompts(),
                   processing_class=models.tokenizer(), inference_address=address)

    for kind, reward, error in [
        ("grpo", score, ZeroDivisionError("no such reward")),
        ("rloo", awaited, Unavailable(Reason.UNREACHABLE, "the reward service is gone")),
        ("online_dpo", score, ZeroDivisionError("no such reward")),
    ]:
        calls.clear()
        trainer = make(kind, reward)
        mine = trainer.accelerator.process_index
        assert trainer.accelerator.num_processes == 2
        try:
            trainer.train()
        except Exception as raised:
            found = raised
        else:
            raise AssertionError("it trained")
        if mine == 1:
            assert found is error, repr(found)
        elif isinstance(error, TandemError):
            assert type(found) is type(error) and found.reason is error.reason, repr(found)
            assert found.message == "the reward service is gone (rank 1)"
        else:
            assert type(found) is OtherRankError, repr(found)
            assert str(found) == "ZeroDivisionError: no such reward (rank 1)"
        assert len(calls) == 2
        print("ENDED", kind, flush=True)
        trainer.close()
        trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_every_rank_ends_with_the_reason_of_the_one_that_failed(
    mixed: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    command = of_script(RANK, mixed.address, checkpoints["llama"], tmp_path)
    with two_ranks(*command, **ON_CPU) as ranks:
        for output in succeeded(ranks, 200):
            ended = [line.split()[1] for line in output.splitlines() if line.startswith("ENDED")]
            assert ended == ["grpo", "rloo", "online_dpo"]
