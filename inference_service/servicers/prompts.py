"""Protobuf's prompts as vLLM's. A whole batch is checked before any of it runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from inference_service.engine import Engine
from tandem.errors import InvalidArgument, Reason, Violation, invalid
from tandem.inference.v1 import inference_pb2 as pb


async def token_ids(engine: Engine, prompts: Sequence[pb.Prompt]) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
        InvalidArgument: names the prompt's field.
    """
    return [await _ids(engine, prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]


async def vllm_prompts(engine: Engine, prompts: Sequence[pb.Prompt]) -> list[dict[str, Any]]:
    """vLLM's prompts, each of token ids, with its images if it has any.

    Raises:
        InvalidArgument: FIELD_INVALID or PROMPT_TOO_LONG, naming the prompt's field.
    """
    if not prompts:
        raise invalid("prompts", "at least one is required")
    found = []
    for i, ids in enumerate(await token_ids(engine, prompts)):
        if prompts[i].HasField("n") and not 1 <= prompts[i].n <= 2**16:
            raise invalid(f"prompts[{i}].n", f"must be from 1 to {2**16}, is {prompts[i].n}")
        check_ids(engine, ids, f"prompts[{i}]")
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if prompts[i].images:
            if not engine.llm.vllm_config.model_config.is_multimodal_model:
                raise invalid(f"prompts[{i}].images", "the model has no eyes: it takes text alone")
            prompt["multi_modal_data"] = {
                "image": [_image(data, f"prompts[{i}].images[{j}]") for j, data in enumerate(prompts[i].images)]
            }
        found.append(prompt)
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


async def _ids(engine: Engine, prompt: pb.Prompt, field: str) -> list[int]:
    match prompt.WhichOneof("input"):
        case "token_ids":
            return list(prompt.token_ids.ids)
        case "text":
            return await engine.encode(prompt.text)
        case "chat":
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
        messages.append({"role": message.role, "content": message.content} | _plain(message.fields))
    options = _plain(chat.template_kwargs)
    options["add_generation_prompt"] = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    if chat.HasField("template"):
        options["chat_template"] = chat.template
    if chat.tools:
        options["tools"] = [_plain(tool) for tool in chat.tools]
    try:
        return await engine.render(messages, **options)
    except InvalidArgument as error:
        raise invalid(field, error.violations[0].description) from error


def _plain(struct: Struct) -> dict[str, Any]:
    return dict(json_format.MessageToDict(struct))


def _image(data: bytes, field: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise invalid(field, f"not an image: {error}") from error
