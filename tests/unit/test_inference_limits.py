"""What one caller, or all together, may ask of the service: counted before anything is made of it."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.admission import Room
from inference_service.rollouts import Piece, Request, Rollouts
from inference_service.servicers import images, prompts
from inference_service.servicers.images import decoded
from inference_service.servicers.inference import _FINISH, InferenceServicer
from inference_service.servicers.prompts import token_ids, vllm_prompts
from tandem.errors import InvalidArgument, Reason, ResourceExhausted, Unavailable
from tandem.inference.v1 import inference_pb2 as pb


class Held:
    """Rollouts that all wait until they are let go; it remembers how many were ever made."""

    def __init__(self) -> None:
        self.made = 0
        self.free = asyncio.Event()

    async def run(self, requests: list[Request]) -> AsyncIterator[list[Any]]:
        self.made += len(requests)
        completion = SimpleNamespace(token_ids=[5], logprobs=None, finish_reason="stop", stop_reason=None)
        output = SimpleNamespace(outputs=[completion], finished=True, num_cached_tokens=0)
        pieces = [Piece(index=r.index, output=output, spans=[(1, 1)], first=True) for r in requests]
        yield pieces[:1]
        await self.free.wait()
        yield pieces[1:]

    async def score(self, requests: list[Request]) -> AsyncIterator[tuple[int, Any, int]]:
        self.made += len(requests)
        await self.free.wait()
        flat = SimpleNamespace(start_indices=[0, 0], end_indices=[0, 1], logprobs=[-1.0])
        for request in requests:
            yield request.index, flat, 1


@pytest.fixture
async def held() -> Held:
    return Held()


@pytest.fixture
def servicer(held: Held) -> InferenceServicer:
    info = SimpleNamespace(max_model_len=64, vocab_size=64, max_logprobs=20)
    policy = SimpleNamespace(engine=SimpleNamespace(info=info), rollouts=held)
    host: Any = SimpleNamespace(generating=lambda: policy, policy=policy)
    return InferenceServicer(host, 1 << 20, max_rollouts=10)


def generate(servicer: InferenceServicer, *counts: int) -> AsyncIterator[pb.GenerateResponse]:
    prompts = [pb.Prompt(token_ids=pb.TokenIds(ids=[5]), n=n) for n in counts]
    return servicer.Generate(pb.GenerateRequest(prompts=prompts), None)


def score(servicer: InferenceServicer, count: int) -> AsyncIterator[pb.ScoreResponse]:
    return servicer.Score(pb.ScoreRequest(sequences=[pb.TokenIds(ids=[5, 6])] * count), None)


async def size(stream: AsyncIterator[Any]) -> int:
    return sum([len(getattr(m, "rollouts", None) or m.scores) async for m in stream])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s: generate(s, 6, 5), "prompts"),
        (lambda s: generate(s, *[2**16] * 1000), "prompts"),
        (lambda s: score(s, 11), "sequences"),
    ],
    ids=["just", "millions", "score"],
)
async def test_a_call_larger_than_the_service_is_refused_before_anything_is_made(
    servicer: InferenceServicer, held: Held, call: Callable[..., Any], field: str
) -> None:
    with pytest.raises(InvalidArgument, match="max_rollouts is 10") as raised:
        await size(call(servicer))
    assert [found.field for found in raised.value.violations] == [field]
    assert held.made == 0


async def test_prompts_by_the_million_are_counted_before_any_is_looked_at(
    servicer: InferenceServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "num_rollouts", lambda _: pytest.fail("looked at each"))
    with pytest.raises(InvalidArgument, match="max_rollouts is 10"):
        await size(generate(servicer, *[1] * 11))


@pytest.mark.parametrize("reason", [Reason.ENGINE_TORN, Reason.ENGINE_ASLEEP])
async def test_what_was_still_tokenized_when_the_engine_stopped_is_not_added(
    held: Held, reason: Reason
) -> None:
    """It would wait for its deadline: nobody ends what comes after."""
    stopped: list[Unavailable] = []
    held.free.set()

    async def encode(text: str) -> list[int]:
        stopped.append(Unavailable(reason, "stopped"))
        return [5]

    def generating() -> Any:
        if stopped:
            raise stopped[0]
        return policy

    info = SimpleNamespace(max_model_len=64, vocab_size=64, max_logprobs=20)
    policy = SimpleNamespace(engine=SimpleNamespace(info=info, encode=encode), rollouts=held)
    host: Any = SimpleNamespace(generating=generating)
    with pytest.raises(Unavailable) as raised:
        await size(
            InferenceServicer(host, 1 << 20).Generate(pb.GenerateRequest(prompts=[pb.Prompt(text="x")]), None)
        )
    assert raised.value.reason is reason
    assert held.made == 0


async def test_more_prompts_to_tokenize_than_ever_run_are_refused(servicer: InferenceServicer) -> None:
    asked = pb.TokenizeRequest(prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=[5]))] * 11)
    with pytest.raises(InvalidArgument, match="max_rollouts is 10") as raised:
        await servicer.Tokenize(asked, None)
    assert [found.field for found in raised.value.violations] == ["prompts"]
    del asked.prompts[0]
    assert len((await servicer.Tokenize(asked, None)).prompts) == 10


async def test_what_fits_with_nothing_else_is_told_when_to_come_back(
    servicer: InferenceServicer, held: Held
) -> None:
    first = generate(servicer, 4, 4)
    assert len((await anext(first)).rollouts) == 1  # which has ended, so that its room is free
    for call in (generate(servicer, 4), score(servicer, 4)):
        with pytest.raises(ResourceExhausted) as raised:
            await size(call)
        assert raised.value.reason is Reason.QUEUE_FULL
        assert raised.value.retry_after
        assert raised.value.metadata == {"taken": "7", "max_rollouts": "10"}
    assert held.made == 8
    held.free.set()
    assert await size(generate(servicer, 3)) == 3
    assert await size(first) == 7
    assert await size(score(servicer, 10)) == 10
    assert await size(generate(servicer, 10)) == 10


async def test_a_call_that_is_broken_off_gives_its_room_back(servicer: InferenceServicer) -> None:
    stream: Any = generate(servicer, 10)
    await anext(stream)
    await stream.aclose()
    assert servicer._room.taken == 0


def test_room_is_given_back_by_calls_that_fail() -> None:
    room = Room(5)
    with pytest.raises(KeyError), room.take(5, "prompts"):
        raise KeyError
    with room.take(5, "prompts") as place:
        place.left -= 2
        assert room.taken == 3
    assert room.taken == 0


TEMPLATE = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")], template="{{ 1 }}"))


async def test_templates_of_callers_are_off_until_allowed() -> None:
    async def render(*args: Any, template: str, **kwargs: Any) -> list[int]:
        return [len(template)]

    engine: Any = SimpleNamespace(render=render)
    with pytest.raises(InvalidArgument, match="allow_chat_templates") as raised:
        await token_ids(engine, [TEMPLATE], templates=False)
    assert [found.field for found in raised.value.violations] == ["prompts[0].chat.template"]
    assert await token_ids(engine, [TEMPLATE], templates=True) == [[7]]


def png(width: int, height: int) -> bytes:
    """A picture that says how large it is, and has nothing of that."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def picture(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_decoded(kind: str) -> None:
    first, second = decoded({"a": picture(kind), "b": picture("PNG")})
    assert (first.size, first.mode, second.getpixel((0, 0))) == ((4, 3), "RGB", (255, 0, 0))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png(2**13, 2**13 + 1), "is more than 67108864 pixels"),
        (png(2**16, 2**16), "bomb"),
        (png(4, 4), "not an image"),
        (picture("PNG")[:50], "image"),
        (picture("BMP"), "not a PNG, JPEG or WebP"),
        (b"", "not a PNG"),
    ],
    ids=["large", "bomb", "nothing", "cut", "bmp", "empty"],
)
def test_a_picture_that_cannot_be_is_named(data: bytes, says: str) -> None:
    with pytest.raises(InvalidArgument, match=says) as raised:
        decoded({"a": picture("PNG"), "b": data})
    assert [found.field for found in raised.value.violations] == ["b"]


def test_the_pictures_of_a_call_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_rgb", lambda image, field: pytest.fail("decoded before all were looked at"))
    with pytest.raises(InvalidArgument, match="up to this one") as raised:
        decoded({f"images[{i}]": png(2**13, 2**13) for i in range(5)})
    assert [found.field for found in raised.value.violations] == ["images[4]"]


async def test_pictures_are_decoded_beside_the_event_loop_and_reach_their_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    threads = []
    whole = images._rgb
    monkeypatch.setattr(
        images, "_rgb", lambda *given: threads.append(threading.current_thread()) or whole(*given)
    )
    seeing = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=True))
    info = SimpleNamespace(max_model_len=64, vocab_size=64)
    engine: Any = SimpleNamespace(info=info, llm=SimpleNamespace(vllm_config=seeing))
    ids = pb.TokenIds(ids=[5])
    asked = [
        pb.Prompt(token_ids=ids, images=[picture("PNG")]),
        pb.Prompt(token_ids=ids),
        pb.Prompt(token_ids=ids, images=[picture("JPEG"), picture("WEBP")]),
    ]
    found = await vllm_prompts(engine, asked, templates=False)
    assert [len(p.get("multi_modal_data", {"image": []})["image"]) for p in found] == [1, 0, 2]
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def finishing(reason: str, tokens: Sequence[int] = (5,)) -> Rollouts:
    """Rollouts of an engine that ends each with `reason` and `tokens`."""
    completion = SimpleNamespace(token_ids=list(tokens), finish_reason=reason)
    output = SimpleNamespace(outputs=[completion], finished=True, prompt_logprobs=None)

    async def add_request(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(get_nowait=lambda: output)

    stats = SimpleNamespace(rollouts_finished=0)
    llm = SimpleNamespace(add_request=add_request)
    engine: Any = SimpleNamespace(llm=llm, stats=stats, dead=False, quiet=lambda: None)
    return Rollouts(engine, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
async def test_an_error_that_ends_a_request_is_one_to_try_again_after() -> None:
    request = Request("a", {}, None)
    for stream in (finishing("error").run([request]), finishing("error").score([request])):
        with pytest.raises(Unavailable) as raised:
            await anext(stream)
        assert raised.value.reason is Reason.INTERRUPTED


CONSTRAINED = SimpleNamespace(structured_outputs="a grammar", clone=lambda: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
@pytest.mark.parametrize(
    ("prompt", "tokens", "again"),
    [({}, [], False), ({}, [5], False), ({}, [5, 6], True), ({"multi_modal_data": {}}, [], True)],
    ids=["not compiled", "no token passes", "later", "a picture"],
)
async def test_a_constraint_that_is_none_is_the_callers_mistake(
    prompt: dict[str, Any], tokens: list[int], again: bool
) -> None:
    """To try again would not help."""
    with pytest.raises(Unavailable if again else InvalidArgument) as raised:
        await anext(finishing("error", tokens).run([Request("a", prompt, CONSTRAINED)]))
    fields = [found.field for found in raised.value.violations]
    assert fields == ([] if again else ["sampling.structured_output"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
async def test_what_comes_after_rollouts_failed_fails_too_until_the_next_version() -> None:
    rollouts, aborted = finishing("stop"), []

    async def abort(ids: Any) -> None:
        aborted.append(ids)

    rollouts._engine.llm.abort = abort
    await rollouts.fail(Unavailable(Reason.ENGINE_TORN, "torn"))
    with pytest.raises(Unavailable, match="torn"):
        await anext(rollouts.run([Request("a", {}, None)]))
    rollouts.advance(2)
    assert [piece async for piece in rollouts.run([Request("a", {}, None)])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
async def test_every_end_that_vllm_knows_is_known_here() -> None:
    from vllm.v1.engine import FINISH_REASON_STRINGS

    assert {*FINISH_REASON_STRINGS} - {*_FINISH} == {"error"}
    for reason in _FINISH:
        assert [piece async for piece in finishing(reason).run([Request("a", {}, None)])]
