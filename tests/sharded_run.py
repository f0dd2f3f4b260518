"""One rank of runs of two: python -m tests.sharded_run ADDRESS CHECKPOINT REFERENCE FOLDER HOW [LAYER]

HOW is ddp, or fsdp2 or zero3, where the policy is spread over both. Trains every algorithm for two steps, and compares
the engine's bits with the policy's, gathered. With LAYER, the class of the model's layers where it is no Llama, that is
GRPO alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from tandem.rpc import connect
from tandem.weights.v1 import weights_pb2 as pb
from tandem.weights.v1.weights_pb2_grpc import WeightServiceStub
from tests import models, trainers
from tests.golden import trl_1_13 as golden
from tests.integration.test_trainer_pairs import KINDS
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.policy_tensors import EVERYTHING, policy_tensors
from trainer_service.shards import is_sharded
from weight_transfer.digest import combine, digest_tensor

SHARDING: dict[str, dict[str, Any]] = {
    "ddp": {"ddp_find_unused_parameters": False},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
    "zero3": {
        "use_cpu": False,
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
        },
    },
}


def on_the_cpu(how: str) -> None:
    """Accelerate shards on accelerators only; torch and DeepSpeed do on a CPU as well."""
    whole, part = state.AcceleratorState.__init__, state.PartialState.__init__

    def accelerator_state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        whole(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    def partial_state(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        part(self, cpu, **({"backend": "gloo"} | kwargs))

    if how == "fsdp2":
        state.AcceleratorState.__init__ = accelerator_state
    elif how == "zero3":
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        import deepspeed

        # Collectives over shared memory, which it would compile for half a minute: gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        state.PartialState.__init__ = partial_state


def trainer_of(kind: str, address: str, paths: list[Path], folder: Path, **values: Any) -> Any:
    own = {name: values.pop(name) for name in ("peft_config", "lora_mode") if name in values}
    policy, reference = (trainers.model_of(path, torch.float32) for path in paths)
    if kind in ("grpo", "rloo"):
        values |= {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
        return trainers.make(kind, SimpleNamespace(address=address), policy, folder, **values, **own)
    cls, config = KINDS[kind]
    settings = golden.SETTINGS | {"max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    return cls(
        policy,
        None if own else reference,
        trainers.reward,
        config(str(folder), **(settings | values)),
        train_dataset=Dataset.from_dict({"prompt": trainers.PROMPTS * 4}),
        processing_class=models.tokenizer(),
        inference_address=address,
        **own,
    )


def assert_same_bits(address: str, model: torch.nn.Module) -> None:
    """The engine holds the policy, gathered here: every rank must call this."""
    with connect(address) as channel:
        weights = WeightServiceStub(channel)
        wanted = weights.GetManifest(pb.GetManifestRequest(), timeout=30).manifest.tensors
        now = weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=True), timeout=30)
    sources = {source.name: source for source in policy_tensors(model, EVERYTHING)}
    digests = []
    for tensor in wanted:
        dtype = getattr(torch, pb.Dtype.Name(tensor.dtype).removeprefix("DTYPE_").lower())
        digests.append(digest_tensor(sources[tensor.name].read().to(dtype)))
    assert now.digest == combine(digests)


def assert_same_adapter(address: str, model: torch.nn.Module) -> None:
    """The engine holds the adapter, gathered here: every rank must call this."""
    with connect(address) as channel:
        request = pb.GetWeightVersionRequest(include_digest=True, adapter="policy")
        now = WeightServiceStub(channel).GetWeightVersion(request, timeout=30)
    sources = sorted(adapter_tensors(model), key=lambda source: source.name)
    assert now.digest == combine([digest_tensor(source.read()) for source in sources])


def assert_same_on_both(trainer: Any) -> None:
    """Each rank trained on rollouts of its own, and both have what came of all."""
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    own = torch.tensor([[parameter.double().sum() for parameter in trainer.model.parameters()]])
    first, second = trainer.accelerator.gather(own)
    assert torch.equal(first, second)


def main(address: str, checkpoint: str, reference: str, folder: str, how: str, layer: str = "") -> None:
    on_the_cpu(how)
    if layer:
        SHARDING["fsdp2"]["fsdp_config"]["transformer_layer_cls_to_wrap"] = [layer]
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    runs: list[tuple[str, str, dict[str, Any]]] = [
        # First, while the engine's weights are the checkpoint's.
        ("rloo", "server", {"peft_config": lora, "lora_mode": "adapter", "learning_rate": 0.05}),
        ("grpo", "colocate", {}),
        ("rloo", "server", {}),
        ("online_dpo", "server", {}),
        ("nash_md", "colocate", {}),
        ("xpo", "server", {}),
        ("grpo", "server", {"peft_config": lora}),
    ]
    if layer:
        runs = [("grpo", "colocate", {}), ("grpo", "server", {})]
    for number, (kind, mode, values) in enumerate(runs):
        paths = [Path(checkpoint), Path(reference)]
        into = Path(folder, str(number))
        trainer = trainer_of(kind, address, paths, into, vllm_mode=mode, **SHARDING[how], **values)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        if how == "ddp":
            assert_same_on_both(trainer)
        else:
            assert any(map(is_sharded, trainer.model.parameters())), "the policy is spread over both"
        assert len(trainers.logged(trainer, "loss")) == 2
        for apart in trainers.logged(trainer, "sampling/sampling_logp_difference/max"):
            assert apart < 1e-4, "the engine sampled from the policy"
        trainer.vllm_generation.sync_weights()
        if "lora_mode" in values:
            assert_same_adapter(address, trainer.model)
        else:
            assert_same_bits(address, trainer.model)
        print("RAN", kind, mode, *values, flush=True)  # noqa: T201  # read by the test
        trainer.close()
        trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
