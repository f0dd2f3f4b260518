"""Protobuf's prompts as vLLM's. A whole batch is checked before any of it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from inference_service.engine import Engine
from inference_service.servicers.images import decoded
from tandem.errors import InvalidArgument, Reason, Violation, invalid
from tandem.inference.v1 import inference_pb2 as pb


def num_rollouts(prompts: Sequence[pb.Prompt]) -> int:
    """How many rollouts are asked for.

    Raises:
        InvalidArgument: names the field.
    """
    if not prompts:
        raise invalid("prompts", "at least one is required")
    total = 0
    for i, asked in enumerate(prompts):
        if asked.HasField("n") and not 1 <= asked.n <= 2**16:
            raise invalid(f"prompts[{i}].n", f"must be from 1 to {2**16}, is {asked.n}")
        total += asked.n or 1
    return total


async def token_ids(engine: Engine, prompts: Sequence[pb.Prompt], *, templates: bool) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        InvalidArgument: names the prompt's field; where not `templates`, also a chat's template.
    """
    return [
        await _ids(engine, prompt, f"prompts[{i}]", templates=templates) for i, prompt in enumerate(prompts)
    ]


async def vllm_prompts(
    engine: Engine, prompts: Sequence[pb.Prompt], *, templates: bool
) -> list[dict[str, Any]]:
    """vLLM's prompts, each of token ids, with its images if it has any.

    Raises:
        InvalidArgument: FIELD_INVALID or PROMPT_TOO_LONG, naming the prompt's field.
    """
    found: list[dict[str, Any]] = []
    for i, ids in enumerate(await token_ids(engine, prompts, templates=templates)):
        check_ids(engine, ids, f"prompts[{i}]")
        if prompts[i].images and not engine.llm.vllm_config.model_config.is_multimodal_model:
            raise invalid(f"prompts[{i}].images", "the model has no eyes: it takes text alone")
        found.append({"prompt_token_ids": ids})
    encoded = {
        f"prompts[{i}].images[{j}]": data
        for i, prompt in enumerate(prompts)
        for j, data in enumerate(prompt.images)
    }
    if encoded:  # not on the event loop: a picture may take a second
        pictures = iter(await asyncio.to_thread(decoded, encoded))
        for prompt, asked in zip(found, prompts, strict=True):
            if asked.images:
                prompt["multi_modal_data"] = {"image": list(islice(pictures, len(asked.images)))}
    return found


def check_ids(engine: Engine, ids: list[int], field: str) -> None:
    """Refuse token ids that leave no room in the context or are not in the vocabulary."""
    info = engine.info
    if not ids:
        raise invalid(field, "no tokens")
    if len(ids) >= info.max_model_len:
        text = f"{len(ids)} tokens leave no room in the model's context of {info.max_model_len}"
        raise InvalidArgument(
            Reason.PROMPT_TOO_LONG,
            f"{field}: {text}",
            violations=[Violation(field, text)],
            metadata={"num_tokens": str(len(ids)), "max_model_len": str(info.max_model_len)},
        )
    if (largest := max(ids)) >= info.vocab_size:
        raise invalid(field, f"token id {largest} is not in the vocabulary of {info.vocab_size}")


async def _ids(engine: Engine, prompt: pb.Prompt, field: str, *, templates: bool) -> list[int]:
    match prompt.WhichOneof("input"):
        case "token_ids":
            return list(prompt.token_ids.ids)
        case "text":
            return await engine.encode(prompt.text)
        case "chat":
            if prompt.chat.HasField("template") and not templates:
                # It would be rendered in the one thread that all texts and chats need, for as long as it likes.
                raise invalid(f"{field}.chat.template", "the service does not allow_chat_templates")
            return await _chat(engine, prompt.chat, f"{field}.chat")
        case _:
            raise invalid(field, "one of token_ids, text, chat is required")


async def _chat(engine: Engine, chat: pb.Chat, field: str) -> list[int]:
    if not chat.messages:
        raise invalid(f"{field}.messages", "at least one is required")
    messages = []
    for i, message in enumerate(chat.messages):
        if not message.role:
            raise invalid(f"{field}.messages[{i}].role", "is required")
        fields = _plain(message.fields, f"{field}.messages[{i}].fields")
        messages.append({"role": message.role, "content": message.content} | fields)
    variables = _plain(chat.template_kwargs, f"{field}.template_kwargs")
    tools = [_plain(tool, f"{field}.tools[{i}]") for i, tool in enumerate(chat.tools)]
    open_turn = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    template = chat.template if chat.HasField("template") else None
    try:
        return await engine.render(
            messages, variables, template=template, tools=tools, add_generation_prompt=open_turn
        )
    except InvalidArgument as error:
        inner = error.violations[0]
        raise invalid(f"{field}.{inner.field}" if inner.field else field, inner.description) from error


def _plain(struct: Struct, field: str) -> dict[str, Any]:
    try:
        return dict(_ordered(json_format.MessageToDict(struct)))
    except ValueError as error:  # NaN and infinity are no JSON
        raise invalid(field, str(error)) from error


def _ordered(value: Any) -> Any:
    """A Struct has no order of its keys, a different one in each process, and knows floats alone. Prompts made of it
    must be the same each time, and look as people write them.
    """
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_ordered(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
