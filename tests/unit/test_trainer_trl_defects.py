"""What is wrong in TRL's own way to vLLM, shown on TRL's code, and right in ours.

A test that shows a defect fails once TRL has mended it: then the claim in the documentation goes as well.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.inference.v1 import inference_pb2 as pb
from tests.ranks import ON_CPU, ended, of_script, two_ranks
from trainer_service._trl import VLLMGeneration
from trainer_service.generation import RemoteGeneration
from trainer_service.policy_tensors import policy_tensors
from weight_transfer.manifest import Manifest, TensorSpec
from weight_transfer.transports.stream import StreamTransport


class RecordingServer:
    """Stands where TRL's HTTP client is, and answers each prompt with its own first token, marked by 100."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list[list[int]], n: int, **_: Any) -> dict[str, Any]:
        self.prompts += prompts
        return {
            "prompt_ids": prompts,
            "completion_ids": [[100 + ids[0]] for ids in prompts for _ in range(n)],
            "logprobs": None,
        }


class TrlServerMode(VLLMGeneration):
    """TRL's class as it is, but for the HTTP connection."""

    def _init_vllm(self) -> None:
        self.vllm_client = RecordingServer()


class RecordingClient:
    """Stands where our gRPC client is, and answers in the same way."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def wait_until_serving(self, timeout_s: float, **_: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(max_model_len=64, logprobs_mode="processed_logprobs")

    def generate(self, groups: list[Any], sampling: Any, logprobs: bool, **_: Any) -> list[list[pb.Rollout]]:
        self.prompts += [list(group.token_ids) for group in groups]
        return [
            [pb.Rollout(token_ids=[100 + group.token_ids[0]], logprobs=[-1.0])] * group.n for group in groups
        ]


# As `environment_factory` makes them: each rollout of a group has its own observation in the prompt.
GROUPS_THAT_DIFFER = [[1], [2], [3], [4]]


def test_trl_samples_three_of_four_rollouts_from_the_wrong_prompt() -> None:
    trl = TrlServerMode(None, Accelerator(cpu=True), None, mode="server")
    _, completions, _, _ = trl.generate(GROUPS_THAT_DIFFER, None, num_generations=4)
    assert trl.vllm_client.prompts == [[1]]
    assert completions == [[101], [101], [101], [101]]


def test_ours_samples_each_row_from_its_own_prompt_and_equal_rows_together() -> None:
    client = RecordingClient()
    ours = RemoteGeneration(None, Accelerator(cpu=True), None, client=client, weights=None)
    prompts, completions, logprobs, ids = ours.generate(GROUPS_THAT_DIFFER, None, num_generations=4)
    assert prompts == GROUPS_THAT_DIFFER
    assert completions == [[101], [102], [103], [104]]
    assert (logprobs, ids) == ([[[-1.0]]] * 4, [[[101]], [[102]], [[103]], [[104]]])
    client.prompts.clear()
    assert ours.generate([[5], [6], [5], [5]], None, 2)[1] == [[105], [106], [105], [105]]
    assert client.prompts == [[5], [6]]


def lora_model() -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    return model.to(torch.bfloat16)


def vllm_pack_tensors() -> Any:
    """vLLM's packing producer, from its file: the package around it would take seconds to import."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    path = Path(spec.origin).parent / "distributed" / "weight_transfer" / "packed_tensor.py"
    module_spec = importlib.util.spec_from_file_location("packed_tensor", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["packed_tensor"] = module  # dataclasses look themselves up there
    try:
        module_spec.loader.exec_module(module)
    finally:
        del sys.modules["packed_tensor"]
    return module


NAME = "model.layers.0.self_attn.q_proj.weight"


def test_trl_sends_lora_unmerged_through_vllms_packing_and_ours_merged() -> None:
    model = lora_model()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    base = layer.base_layer.weight.detach().clone()
    merged = base + layer.get_delta_weight("default")
    assert not torch.equal(base, merged)

    packing = vllm_pack_tensors()
    trl = TrlServerMode(model, Accelerator(cpu=True), None, mode="server")
    chunk = packing.pack_tensors(trl._iter_named_params(), lambda item: item[1], 1 << 30)
    sent = dict(
        packing.unpack_tensor(
            chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes
        )
    )
    # What TRL sends is the base again, give or take what adding and subtracting in bf16 has done to it.
    assert (sent[NAME] - merged).abs().max() > 0.1
    assert torch.allclose(sent[NAME], base, atol=0.02)

    with torch.no_grad():
        layer.base_layer.weight.copy_(base)
    specs = [s.spec for s in policy_tensors(model)]
    manifest = Manifest(tuple(TensorSpec(s.name, "bfloat16", s.shape) for s in specs))
    received = {name: bytearray() for name in manifest.positions}
    StreamTransport(manifest, 1 << 20).move(
        policy_tensors(model), lambda chunk: received[manifest.tensors[chunk.tensor].name].extend(chunk.data)
    )
    assert torch.equal(torch.frombuffer(received[NAME], dtype=torch.bfloat16).view(32, 32), merged)
    assert torch.equal(layer.base_layer.weight, base)


def test_trls_merging_changes_the_base_and_ours_does_not() -> None:
    model = lora_model()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    base = weight.detach().clone()
    for source in policy_tensors(model):
        source.read()
    assert torch.equal(weight, base)
    for _ in TrlServerMode(model, Accelerator(cpu=True), None, mode="server")._iter_named_params():
        pass
    assert not torch.equal(weight, base)


RANKS = """
    import sys, torch.distributed as dist
    from datetime import timedelta
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, gather_object
    from tests.unit.test_trainer_trl_defects import RecordingClient, TrlServerMode
    from trainer_service.generation import RemoteGeneration

    deadline = InitProcessGroupKwargs(timeout=timedelta(seconds=8))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[deadline])
    rank = accelerator.process_index
    if sys.argv[1] == "trl":
        generation = TrlServerMode(None, accelerator, None, mode="server")
    else:
        generation = RemoteGeneration(None, accelerator, None, client=RecordingClient(), weights=None)

    def generate(prompts):
        return [completion[0] for completion in generation.generate(prompts, None, 1)[1]]

    # The first turn is every rank's. Then rank 0 has two tool turns and rank 1 has one, with more rows.
    own = 10 * (rank + 1)
    turns = [generate([[own], [own + 1]])]
    rows = [[[own + 2]], [[own + 3]]] if rank == 0 else [[[own + 2], [own + 3], [own + 4]]]
    turns += [generate(prompts) for prompts in rows]
    # The trainer's own next collective: the lengths of all completions.
    everybody = gather_object([turns])
    assert turns[0] == [100 + own, 101 + own], turns
    assert turns[1:] == [[100 + ids[0] for ids in prompts] for prompts in rows], turns
    assert len(everybody) == 2, everybody
    print("rank", rank, "is right")
"""


def run_ranks(whose: str) -> list[tuple[int, str]]:
    """Exit code and output of two ranks."""
    with two_ranks(*of_script(RANKS, whose), **ON_CPU) as ranks:
        return ended(ranks, 60)


def test_tool_turns_that_differ_by_rank_break_trl_and_not_ours() -> None:
    trl = run_ranks("trl")
    assert all("is right" not in output for _, output in trl), trl
    assert all(code != 0 for code, _ in trl), trl
    ours = run_ranks("tandem")
    assert [code for code, _ in ours] == [0, 0], "\n".join(output for _, output in ours)
