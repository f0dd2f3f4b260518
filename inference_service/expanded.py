"""Prompts with images whose places are as long already as what is seen there.

vLLM takes one placeholder for each image and makes it as long as the image has features. A trainer's processor has done
that by itself, for its loss: vLLM would make it long a second time, and sample from another prompt.
"""

from __future__ import annotations

from typing import Any


def accept_expanded() -> None:
    """Have vLLM take a prompt as it is where it finds every image's whole place in it. For good, in this process."""
    from vllm.multimodal.processing.processor import BaseMultiModalProcessor

    processor: Any = BaseMultiModalProcessor
    apply = processor._apply_prompt_updates
    if apply.__module__ == __name__:
        return

    def _apply_prompt_updates(self: Any, token_ids: list[int], updates: Any) -> Any:
        places = self._find_mm_placeholders(token_ids, updates)
        if all(len(places.get(kind, ())) == len(items) for kind, items in updates.items()):
            return token_ids, places
        return apply(self, token_ids, updates)

    processor._apply_prompt_updates = _apply_prompt_updates
