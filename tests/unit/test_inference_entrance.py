"""How the requests of a call enter the engine: at once, but for the turns of the event loop that others need."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.rollouts import _TURN, Request, Rollouts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports

IDS = {"prompt_token_ids": [5, 6]}


class Llm:
    """vLLM as far as requests enter it: at once, and each ends with its first token."""

    def __init__(self, *, encoder: bool = False) -> None:
        self.turn = 0
        self.added: list[tuple[int, str, Any, Any]] = []  # turn of the event loop, id, prompt, seed
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(is_encoder_decoder=encoder))

    async def add_request(self, request_id: str, prompt: Any, params: Any, **_: Any) -> Any:
        self.added.append((self.turn, request_id, prompt, params.seed))
        completion = SimpleNamespace(token_ids=[5], finish_reason="stop")
        output = SimpleNamespace(outputs=[completion], finished=True)
        return SimpleNamespace(get_nowait=lambda: output)

    async def tick(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


class Params(SimpleNamespace):
    """vLLM's SamplingParams."""

    def clone(self) -> Params:
        return Params(**vars(self))


class Gathered:
    """The engine's pause while requests come in."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


async def entered(llm: Llm, *requests: Request) -> list[tuple[int, str, Any, Any]]:
    """What `requests`, of one call, are to vLLM."""
    stats = SimpleNamespace(rollouts_finished=0)
    engine: Any = SimpleNamespace(llm=llm, stats=stats, dead=False, gathering=Gathered, quiet=lambda: None)
    ticking = asyncio.ensure_future(llm.tick())
    ended = [piece.index async for pieces in Rollouts(engine, 1).run(requests) for piece in pieces]
    ticking.cancel()
    assert sorted(ended) == list(range(len(requests)))
    return llm.added


def request(k: int, prompt: dict[str, Any] = IDS, *, seed: int | None = None, grammar: Any = None) -> Request:
    return Request(f"r{k}", prompt, Params(structured_outputs=grammar, seed=None), index=k, seed=seed)


@pytest.mark.parametrize(("seeded", "together"), [(False, _TURN), (True, 1)])
async def test_a_large_call_leaves_turns_to_others(seeded: bool, together: int) -> None:
    count = 5 * _TURN
    added = await entered(Llm(), *[request(k, seed=100 + k if seeded else None) for k in range(count)])
    assert [name for _, name, _, _ in added] == [f"r{k}" for k in range(count)]
    turns = [turn for turn, _, _, _ in added]
    assert max(turns.count(turn) for turn in turns) == together
    assert [seed for *_, seed in added] == [100 + k if seeded else None for k in range(count)]


async def test_tokens_are_taken_as_they_are_and_the_rest_is_made_something_of() -> None:
    picture = IDS | {"multi_modal_data": {"image": ["a picture"]}}
    added = await entered(Llm(), request(0), request(1, picture), request(2, grammar="a grammar"))
    assert [prompt for _, _, prompt, _ in added] == [{"type": "token"} | IDS, picture, IDS]
    assert [prompt for _, _, prompt, _ in await entered(Llm(encoder=True), request(0))] == [IDS]
