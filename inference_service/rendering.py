"""Chats as token ids."""

from __future__ import annotations

from typing import Any

from inference_service.refusals import one_line
from tandem.errors import invalid

#: What a tokenizer's apply_chat_template takes for itself, beside what Tandem sets.
_RENDER_OPTIONS = frozenset(
    {"conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "padding", "truncation"}
    | {
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
    }
)


def rendered(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    *,
    template: str | None,
    **options: Any,
) -> list[int]:
    """Token ids of a chat; `options` are for the tokenizer. Raises as `Engine.render` does."""
    if taken := sorted(variables.keys() & _RENDER_OPTIONS):
        raise invalid("template_kwargs", f"{taken[0]!r} is no variable of a template")
    try:
        return list(
            tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, chat_template=template, **options, **variables
            )["input_ids"]
        )
    except Exception as error:  # templates are programs: they raise what they like
        raise invalid("template" if template is not None else "", one_line(error)) from error
