"""Tiny real checkpoints, made on the spot: a byte-level tokenizer, random weights, and a model that sees."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

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
    _fill(model)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def _fill(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.uniform_(0.7, 1.3)


#: Of the model that sees: the tokens of an image, and its sides in pixels.
PLACE = [261, 262, 260, 260, 260, 260, 261]
SIDE = 32
SEEING = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


#: transformers has this class ask for torchvision, which it does not use, unless it is a checkpoint's own.
PICTURES = """
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

class Pictures(Idefics3ImageProcessorPil):
    pass
"""


def processor() -> Idefics3Processor:
    """The tokenizer, with tokens for images; and what makes pixels of them, by Pillow: without torchvision."""
    seeing = tokenizer()
    tokens = ["<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    seeing.add_special_tokens({"additional_special_tokens": tokens})
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return Idefics3Processor(images, seeing, image_seq_len=4, chat_template=SEEING)


def make_seeing(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of Idefics3's architecture at `path`: the tiny Llama, with two layers of SigLIP before it."""
    torch.manual_seed(0)
    vision = Idefics3VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    config = Idefics3Config(
        vision_config=vision,
        text_config=LlamaConfig(**SMALL | {"vocab_size": 263}),
        image_token_id=260,
        scale_factor=2,
        pad_token_id=2,
    )
    model = AutoModelForImageTextToText.from_config(config).to(dtype)
    _fill(model)
    model.save_pretrained(path)
    processor().save_pretrained(path)
    (path / "pictures.py").write_text(PICTURES)
    configured = json.loads((path / "processor_config.json").read_text())
    configured["image_processor"]["auto_map"] = {"AutoImageProcessor": "pictures.Pictures"}
    (path / "processor_config.json").write_text(json.dumps(configured))
    return path
