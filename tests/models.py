"""Tiny real checkpoints, made on the spot: a byte-level tokenizer, random weights, three architectures."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SMALL = dict(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=192,
    vocab_size=259,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
ARCHITECTURES = {
    "llama": dict(tie_word_embeddings=True),
    "qwen2": dict(tie_word_embeddings=False),
    "qwen3": dict(tie_word_embeddings=True, head_dim=32),
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """259 tokens: <bos>, <eos>, <pad>, and the 256 bytes."""
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2}
    vocab |= {char: i + 3 for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    fast.chat_template = TEMPLATE
    return fast


def make(
    path: Path,
    architecture: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    **config_fields: object,
) -> Path:
    """A checkpoint of `architecture` at `path`, with weights large enough that greedy choices are clear."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **SMALL | ARCHITECTURES[architecture] | config_fields)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
