"""One rank of runs of two, over an engine of two workers: python -m tests.together_run ADDRESS CHECKPOINT FOLDER HOW

HOW is ddp or fsdp2. Trains by GRPO in colocate mode, all of the policy and then an adapter that is merged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from tests import trainers
from tests.sharded_run import SHARDING, assert_same_bits, assert_same_on_both, on_the_cpu, trainer_of
from trainer_service.shards import is_sharded

#: What the workers split by rows, as FSDP2 does: each rank has what its worker needs.
ALIGNED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def main(address: str, checkpoint: str, folder: str, how: str) -> None:
    on_the_cpu(how)
    whole = DTensor.full_tensor

    def full_tensor(tensor: DTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return whole(tensor, *args, **kwargs)

    shapes: list[tuple[int, ...]] = []
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    for number, values in enumerate(({}, {"peft_config": lora, "learning_rate": 0.05})):
        into = Path(folder, str(number))
        paths = [Path(checkpoint), Path(checkpoint)]
        trainer = trainer_of("grpo", address, paths, into, vllm_mode="colocate", **SHARDING[how], **values)
        rank = trainer.accelerator.process_index
        trainer.train()
        if how == "ddp":
            assert_same_on_both(trainer)
        else:
            assert any(map(is_sharded, trainer.model.parameters())), "the policy is spread over both"
        for apart in trainers.logged(trainer, "sampling/sampling_logp_difference/max"):
            assert apart < 1e-4, "the engine sampled from the policy"
        part = trainer._together._shared.part
        (arena,) = part._arenas
        written = {name for name, placement in part._counted.items() if placement.blocks}
        written |= {name for name, placement in part._copies.items() if placement.blocks}
        if rank == 0:
            weights = trainer.policy_weights
            assert (weights.transport, weights.aliased) == ("shared", False)
            assert weights.bytes_moved == sum(spec.nbytes for spec in weights._session.carried)
            assert written == {spec.name for spec in weights._session.carried}
        shapes.clear()
        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
        trainer.vllm_generation.sync_weights()
        DTensor.full_tensor = whole  # type: ignore[method-assign]
        if how == "ddp":
            assert shapes == [], "each rank has what it writes"
        elif not values:
            own = [p for name, p in trainer.model.named_parameters() if name.split(".")[-2] in ALIGNED]
            others = [p for name, p in trainer.model.named_parameters() if name.split(".")[-2] not in ALIGNED]
            assert own
            assert sorted(shapes) == sorted(tuple(p.shape) for p in others), (
                "no shard that is in its place is gathered"
            )
        assert_same_bits(address, trainer.model)
        print("RAN", how, *values, arena.size, flush=True)  # noqa: T201  # read by the test
        trainer.close()
        trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
