"""An adapter's own tensors: their names, their values, and what cannot be sent as them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from tandem.errors import FailedPrecondition, Reason
from tests.unit.test_trainer_policy_tensors import adapted, model_of, values
from trainer_service.adapter_tensors import adapter_tensors
from trainer_service.policy_tensors import policy_tensors

TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"lora_dropout": 0.5},
        {"layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "dropout", "one_layer"],
)
def test_their_products_are_what_merging_adds(config: dict[str, Any]) -> None:
    base = model_of()
    plain = values(base)
    model = adapted(copy.deepcopy(base), target_modules=TARGETS, **config)
    merged, found = values(model), {s.name: s.read() for s in adapter_tensors(model)}
    modules = {name.removesuffix(".weight") for name in merged if not torch.equal(merged[name], plain[name])}
    assert modules
    assert set(found) == {f"{module}.lora_{part}.weight" for module in modules for part in "AB"}
    for module in modules:
        added = found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]
        expected = merged[f"{module}.weight"] - plain[f"{module}.weight"]
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)
    for source in adapter_tensors(model):
        assert source.spec.shape == tuple(found[source.name].shape)
        assert source.parameter is None


def test_the_base_is_what_it_was_before_the_adapter() -> None:
    base = model_of(tie_word_embeddings=True)
    plain = values(base)
    model = adapted(copy.deepcopy(base), target_modules="all-linear")
    found = {s.name: s.read() for s in policy_tensors(model, plain.keys(), merged=False)}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_wrappers_change_no_name_and_the_active_adapter_counts() -> None:
    model = adapted(model_of(), target_modules=TARGETS)
    expected = {s.name: s.read() for s in adapter_tensors(model)}
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["k_proj"]))
    found = {s.name: s.read() for s in adapter_tensors(nn.DataParallel(model))}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestRefused:
    """By name."""

    @pytest.mark.parametrize(
        ("config", "named"),
        [
            ({"use_dora": True}, "DoRA"),
            ({"bias": "lora_only"}, "bias='lora_only'"),
            ({"lora_bias": True}, "a bias of its own"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"trainable_token_indices": [1, 2]}, "trained tokens' embeddings"),
            ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is adapted by Embedding"),
            ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    def test_what_vllm_does_not_compute(self, config: dict[str, Any], named: str) -> None:
        options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config
        model = get_peft_model(model_of(), LoraConfig(r=4, **options))
        self.told(model, named)

    def test_no_adapter(self) -> None:
        self.told(model_of(), "it is no PeftModel")

    def test_no_lora(self) -> None:
        config = IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])
        self.told(get_peft_model(model_of(), config), "'default' is IA3")

    def test_two_at_once(self) -> None:
        model = adapted(model_of(), target_modules=TARGETS)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
        model.base_model.set_adapter(["default", "other"])
        self.told(model, "2 adapters are active")

    def test_what_is_trained_beside_it(self) -> None:
        model = adapted(model_of(), target_modules=TARGETS)
        model.get_base_model().model.norm.weight.requires_grad_(True)
        self.told(model, "model.norm.weight is trained")

    def told(self, model: nn.Module, named: str) -> None:
        with pytest.raises(FailedPrecondition, match="sent as an adapter") as raised:
            adapter_tensors(model)
        assert raised.value.reason == Reason.TRANSPORT_UNAVAILABLE
        assert named in raised.value.message
