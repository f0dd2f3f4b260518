"""The policy's tensors: their names, their values, and that reading them changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from tandem.errors import FailedPrecondition
from trainer_service.policy_tensors import policy_tensors

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}


def model_of(architecture: str = "llama", dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SMALL, **config)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def adapted(model: nn.Module, **config: object) -> nn.Module:
    """`model` under an adapter whose every weight is random: fresh LoRA would merge to nothing."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_" in name and "magnitude" not in name) or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    return model


def values(model: nn.Module, wanted: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    return {source.name: source.read().clone() for source in policy_tensors(model, wanted)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names_are_the_checkpoints(architecture: str, tmp_path) -> None:
    model = model_of(architecture)
    model.save_pretrained(tmp_path)
    same(values(model), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_names_are_the_checkpoints_where_the_models_are_others(
    lora: bool, loaded: bool, tmp_path: Path
) -> None:
    """What sees has one tree of names in memory and another in files."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**SMALL)
    llava = LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    AutoModelForImageTextToText.from_config(llava).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert not held.keys() & dict(model.named_parameters()).keys() - {"lm_head.weight"}
    if not loaded:  # as a model that was made from its configuration
        model._weight_conversions = None
    same(values(get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if lora else model), held)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("mixtral", {"num_local_experts": 3}),
        ("qwen3_moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
)
def test_experts_that_are_one_parameter_are_the_checkpoints_tensors(
    tmp_path: Path, architecture: str, config: dict[str, object], loaded: bool
) -> None:
    model_of(architecture, **config).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert held.keys() - dict(model.named_parameters()).keys(), "transformers has them otherwise in memory"
    if not loaded:
        model._weight_conversions = None
    sources = {source.name: source for source in policy_tensors(model)}
    same({name: source.read() for name, source in sources.items()}, held)
    experts = {name for name in held if ".experts." in name}
    assert len(experts) == 3 * 3 * 2
    # A piece of a parameter cannot be the engine's memory while the rest of it is elsewhere.
    assert {name for name, source in sources.items() if source.parameter is None} == experts
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    same({name: source.read() for name, source in sources.items()}, {n: t + 1 for n, t in held.items()})


def test_tied_duplicates_only_where_the_engine_has_the_name() -> None:
    model = model_of(tie_word_embeddings=True)
    assert "lm_head.weight" not in values(model)
    sources = {s.name: s for s in policy_tensors(model, {"lm_head.weight", "model.embed_tokens.weight"})}
    assert torch.equal(sources["lm_head.weight"].read(), model.get_input_embeddings().weight)
    # One memory cannot be a view of two places.
    assert sources["lm_head.weight"].parameter is None
    assert sources["model.embed_tokens.weight"].parameter is model.get_input_embeddings().weight


def test_values_are_read_late_and_frozen_parameters_are_in() -> None:
    model = model_of()
    model.model.norm.weight.requires_grad_(False)
    sources = {source.name: source for source in policy_tensors(model)}
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    assert torch.equal(sources["model.norm.weight"].read(), torch.full((32,), 3.0))


def test_buffers_only_where_the_engine_has_the_name() -> None:
    model = model_of()
    model.model.register_buffer("scale", torch.ones(3))
    assert "model.scale" not in values(model)
    assert "model.scale" in values(model, ("model.scale",))


def test_wrappers_are_looked_through() -> None:
    model = model_of()
    plain = values(model)
    same(values(nn.DataParallel(model)), plain)
    compiled = torch.compile(model, backend="eager")
    same(values(compiled), plain)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    same(values(model), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "rslora", "embedding", "dora", "bias", "modules_to_save"],
)
def test_lora_is_merged_as_peft_merges_and_the_base_stays(dtype: torch.dtype, config: dict) -> None:
    kind = {"attention_bias": True} if config.get("lora_bias") else {}
    model = adapted(model_of(dtype=dtype, **kind), **config)
    before = copy.deepcopy(model.state_dict())
    merged = values(model)
    same(dict(model.state_dict()), dict(before))  # to the bit
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    if "q_proj" in config["target_modules"]:
        base = before["base_model.model." + name.replace(".weight", ".base_layer.weight")]
        assert not torch.equal(merged[name], base)
    same(merged, dict(expected))


def test_a_reference_adapter_and_a_switched_off_one_are_not_merged() -> None:
    model = adapted(model_of(), target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    with_default = values(model)[name]
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert torch.equal(values(model)[name], with_default)
    with model.disable_adapter():
        assert torch.equal(values(model)[name], base)


def test_what_cannot_be_merged_says_so() -> None:
    with pytest.raises(FailedPrecondition, match="PREFIX_TUNING"):
        policy_tensors(
            get_peft_model(model_of(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        )
    with pytest.raises(FailedPrecondition, match="not LoRA"):
        policy_tensors(
            get_peft_model(model_of(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        )


def test_quantized_parameters_are_refused_by_name() -> None:
    model = model_of()
    model.model.norm.weight = nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(FailedPrecondition, match=r"model\.norm\.weight is quantized"):
        policy_tensors(model)


def test_fsdp1_is_refused() -> None:
    """Its parameters are views of flat ones, which come and go."""
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # without a process group
    nn.Module.__init__(wrapped)
    with pytest.raises(FailedPrecondition, match="FSDP1"):
        policy_tensors(wrapped)


def test_parameters_that_deepspeed_writes_through_its_buffers_are_never_the_engines_memory() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight._hp_mapping = None  # as ZeRO-1 and 2 mark all of theirs
    sources = {source.name: source for source in policy_tensors(model)}
    assert sources["0.weight"].parameter is None
    assert torch.equal(sources["0.weight"].read(), model[0].weight)
    assert sources["1.weight"].parameter is model[1].weight
