"""Tiny checkpoints of architectures and habits that tests/models.py has no need of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests import models

_COMMON: dict[str, Any] = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
#: bloom's checkpoint has q, k and v interleaved by head, which vLLM reshapes; gpt2's linears are transposed;
#: the experts of mixtral and of qwen3_moe are packed on a CPU, the latter's padded before; deepseek_v2's attention is
#: latent (MLA), of the one size that vLLM has a kernel for on a CPU.
CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "deepseek_v2": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "first_k_dense_replace": 1,
    },
    "mixtral": {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
    },
    "qwen3_moe": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,  # the first layer has no experts
    },
}


def unfused(state: Mapping[str, torch.Tensor], gate: str, up: str, down: str) -> dict[str, torch.Tensor]:
    """What a model's state is in its checkpoint: each expert's projections, cut by hand out of what is fused."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, (first, second) in enumerate(both.chunk(2) for both in tensor):
                found |= {f"{prefix}.{i}.{gate}.weight": first, f"{prefix}.{i}.{up}.weight": second}
        elif last == "down_proj":
            found |= {f"{prefix}.{i}.{down}.weight": one for i, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def make(path: Path, architecture: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of `architecture`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **CONFIGS[architecture], **_COMMON)
    )
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(path)
    models.tokenizer().save_pretrained(path)
    return path


def with_output_layer(path: Path, factor: float) -> Path:
    """A Llama whose config ties the embeddings, and whose checkpoint has the output layer all the same."""
    models.make(path, "llama")
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    return path
