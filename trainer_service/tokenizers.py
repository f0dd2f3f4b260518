"""Whether a tokenizer here and a service's mean the same by their token ids."""

from __future__ import annotations

from typing import Any

from tandem.errors import invalid
from trainer_service.client import InferenceClient
from trainer_service.replicas import Replicas

#: Texts by which two tokenizers are compared, one token of the vocabulary in each, beside the text below.
SAMPLES = 512
_TEXT = "Naïve 2+2 == 4,\n\tdef f(x): return x  # ügly 漢字 🙂"


def check_tokenizer(client: InferenceClient | Replicas, tokenizer: Any, field: str) -> None:
    """Refuse a tokenizer that makes other tokens of a sample of its whole vocabulary than the service does.

    Args:
        client: of the service.
        tokenizer: transformers', or a processor that has one.
        field: what to call it in the error.

    Raises:
        InvalidArgument: names `field`.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    step = max(1, len(tokenizer) // SAMPLES)
    samples = (tokenizer.decode([token]) for token in range(0, len(tokenizer), step))
    texts = [_TEXT, *filter(None, samples)]
    ours = tokenizer(texts, add_special_tokens=False)["input_ids"]
    theirs = client.tokenize(texts)
    head, tail = _around(ours[0], theirs[0])  # special tokens that the service adds to every text
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        if [*head, *mine, *tail] != other:
            raise invalid(
                field, f"the service's tokenizer makes {other} of {text!r}, the one here {list(mine)}"
            )


def _around(part: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """What `whole` has before and after `part`; nothing where it does not have it."""
    for i in range(len(whole) - len(part) + 1):
        if whole[i : i + len(part)] == part:
            return whole[:i], whole[i + len(part) :]
    return [], []
