"""What TRL passes to a reward function as the contract's messages, and back."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, datetime
from types import SimpleNamespace
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from tandem.errors import invalid
from tandem.inference.v1.inference_pb2 import ChatMessage
from tandem.reward.v1 import reward_pb2 as pb
from trainer_service.rewards.checks import EXTRAS

#: Columns that hold the prompt's images, which travel apart.
IMAGES = frozenset({"image", "images"})
#: Integers beyond this are not all doubles.
_EXACT = 2**53


def rollouts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Any],
    wanted: Collection[str] | None = None,
) -> list[pb.Rollout]:
    """The rollouts of a batch.

    Args:
        prompts: texts or chats.
        completions: one for each prompt.
        completion_ids: their token ids, if they are there.
        columns: what else TRL passes, by name.
        wanted: the columns to send. All of the dataset's if None.

    Raises:
        InvalidArgument: names what has no place in a message: `columns.born[3]`.
    """
    pictures: dict[int, bytes] = {}  # rollouts of one prompt share them
    rows = list(_rows(columns, len(prompts), wanted))
    found = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        rollout = pb.Rollout(columns=rows[i])
        rollout.prompt.CopyFrom(_turn(prompt, f"prompts[{i}]", rollout, pictures))
        rollout.completion.CopyFrom(_turn(completion, f"completions[{i}]", rollout, pictures))
        if completion_ids is not None:
            rollout.token_ids.extend(completion_ids[i])
        found.append(rollout)
    return found


def arguments(request: pb.ScoreRequest) -> dict[str, Any]:
    """The keyword arguments that TRL would have called a reward function with.

    Raises:
        InvalidArgument: a rollout has no prompt or no completion, or a picture cannot be read.
    """
    rows = [_plain(rollout.columns, f"rollouts[{i}].columns") for i, rollout in enumerate(request.rollouts)]
    names = sorted({name for row in rows for name in row})
    found: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    found |= {"prompts": [], "completions": []}
    for i, rollout in enumerate(request.rollouts):
        pictures = iter(rollout.images)
        found["prompts"].append(_read(rollout.prompt, f"rollouts[{i}].prompt", pictures))
        found["completions"].append(_read(rollout.completion, f"rollouts[{i}].completion", pictures))
    found["completion_ids"] = [list(rollout.token_ids) for rollout in request.rollouts]
    found["trainer_state"] = SimpleNamespace(global_step=request.global_step)
    return found


def batches(found: Sequence[pb.Rollout], size: int, max_bytes: int) -> Iterator[Sequence[pb.Rollout]]:
    """Cut rollouts into runs of at most `size`, and `max_bytes` unless one alone has more."""
    start, total = 0, 0
    for index, rollout in enumerate(found):
        more = rollout.ByteSize() + 8
        if index > start and (index - start == size or total + more > max_bytes):
            yield found[start:index]
            start, total = index, 0
        total += more
    if found:
        yield found[start:]


def _rows(columns: Mapping[str, Any], count: int, wanted: Collection[str] | None) -> Iterator[Struct]:
    names = (name for name in columns if name not in EXTRAS | IMAGES) if wanted is None else wanted
    lists = {}
    for name in names:
        if name not in columns:
            raise invalid(f"columns.{name}", f"is to be sent, and the dataset has only {', '.join(columns)}")
        values = columns[name]
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != count:
            raise invalid(f"columns.{name}", f"is no list of {count} values: leave it out by columns=[...]")
        lists[name] = values
    for i in range(count):
        row = Struct()
        row.update({name: _json(values[i], f"columns.{name}[{i}]") for name, values in lists.items()})
        yield row


def _json(value: Any, field: str) -> Any:
    """A value as JSON has it."""
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) > _EXACT):
            raise invalid(field, f"{value} is no double: leave the column out by columns=[...]")
        return value
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _json(item, f"{field}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item, f"{field}[{i}]") for i, item in enumerate(value)]
    raise invalid(field, f"a {type(value).__name__} cannot be sent: leave the column out by columns=[...]")


def _turn(value: Any, field: str, rollout: pb.Rollout, pictures: dict[int, bytes]) -> pb.Turn:
    if isinstance(value, str):
        return pb.Turn(text=value)
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise invalid(field, f"is neither a text nor a list of messages, but {type(value).__name__}")
    chat = pb.Messages()
    for i, message in enumerate(value):
        # A dataset has every key in every row, if only as None.
        fields = {
            key: item for key, item in message.items() if key not in ("role", "content") and item is not None
        }
        content = message.get("content")
        if isinstance(content, list | tuple):
            fields["content"] = [_part(part, rollout, pictures) for part in content]
            content = "".join(part["text"] for part in fields["content"] if _is_text(part))
        added = chat.messages.add(role=message.get("role", ""), content=content or "")
        if fields:
            added.fields.update(_json(fields, f"{field}[{i}]"))
    return pb.Turn(chat=chat)


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _part(part: Any, rollout: pb.Rollout, pictures: dict[int, bytes]) -> Any:
    """A part of a message's content. A picture goes to the rollout's images, and leaves its place."""
    picture = part.get("image") if isinstance(part, Mapping) else None
    if picture is None or not hasattr(picture, "save"):
        return part
    if id(picture) not in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        pictures[id(picture)] = buffer.getvalue()
    rollout.images.append(pictures[id(picture)])
    return {key: item for key, item in part.items() if key != "image"}


def _read(turn: pb.Turn, field: str, pictures: Iterator[bytes]) -> str | list[dict[str, Any]]:
    match turn.WhichOneof("form"):
        case "text":
            return turn.text
        case "chat":
            return [
                _message(m, f"{field}.chat.messages[{i}]", pictures) for i, m in enumerate(turn.chat.messages)
            ]
        case _:
            raise invalid(field, "one of text, chat is required")


def _message(message: ChatMessage, field: str, pictures: Iterator[bytes]) -> dict[str, Any]:
    fields = _plain(message.fields, f"{field}.fields")
    found = {"role": message.role, "content": message.content} | fields
    if isinstance(found["content"], list):
        for part in found["content"]:
            empty = isinstance(part, dict) and part.get("type") == "image" and "image" not in part
            if empty and (data := next(pictures, None)):
                part["image"] = _picture(data, field)
    return found


def _picture(data: bytes, field: str) -> Any:
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=["PNG"])
        picture.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise invalid(field, f"cannot read the picture: {error}") from error
    return picture


def _plain(struct: Struct, field: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = _whole(json_format.MessageToDict(struct))
    except ValueError as error:  # NaN and infinity are no JSON
        raise invalid(field, str(error)) from error
    return found


def _whole(value: Any) -> Any:
    """A Struct knows floats alone: 3.0 was mostly 3, and is used as an index or shown as text."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
