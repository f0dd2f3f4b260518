"""Which engines quantize their weights as they load them, and so can again; and which cannot be updated."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what vLLM imports
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineMoEMethod
    from vllm.model_executor.layers.quantization.online.int8 import Int8OnlineMoEMethod

    from inference_service.quantizing import why_not_experts, why_not_quantizing

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def why_not(checkpoint: Path, **engine: Any) -> str:
    adapters = engine.pop("adapters", None)
    config: Any = SimpleNamespace(
        model_config=ModelConfig(model=str(checkpoint), **engine), lora_config=adapters
    )
    return why_not_quantizing(config)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return models.make(tmp_path)


def test_weights_as_they_are(checkpoint: Path) -> None:
    assert not why_not(checkpoint)


@pytest.mark.parametrize("name", ["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"])
def test_what_is_quantized_as_it_is_loaded_takes_updates(checkpoint: Path, name: str) -> None:
    assert not why_not(checkpoint, quantization=name)


def test_a_checkpoint_that_is_quantized_takes_none(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": FP8}))
    assert "no trainer has such tensors" in why_not(checkpoint)


def test_nor_does_one_whose_language_model_is(tmp_path: Path) -> None:
    checkpoint = models.make_seeing(tmp_path)
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"quantization_config": FP8}
    file.write_text(json.dumps(config))
    assert "no trainer has such tensors" in why_not(checkpoint)


def test_one_that_takes_adapters_takes_none(checkpoint: Path) -> None:
    assert "where adapters are" in why_not(checkpoint, quantization="fp8_per_channel", adapters=object())
    assert not why_not(checkpoint, adapters=object())


def test_what_another_way_quantizes_takes_none(checkpoint: Path) -> None:
    assert "by torchao" in why_not(checkpoint, quantization="torchao")


@pytest.mark.parametrize(
    ("method", "refused"), [(Fp8PtpcOnlineMoEMethod, False), (Int8OnlineMoEMethod, True)]
)
def test_experts_whose_kernels_keep_what_they_made_of_scales_take_none(method: type, refused: bool) -> None:
    module: Any = nn.Module()
    module.quant_method = method.__new__(method)  # what makes one wants a device's kernels
    assert bool(why_not_experts([nn.Module(), module])) is refused
