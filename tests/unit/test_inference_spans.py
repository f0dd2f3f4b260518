"""Which weight version made which token of a request."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from inference_service.rollouts import Request, Rollouts, Track


class Engine:
    """Counts tokens, as vLLM's output processor does."""

    def __init__(self) -> None:
        self.tokens: dict[str, int | None] = {}
        self.aborted: list[str] = []
        self.llm = SimpleNamespace(abort=self._abort)

    async def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def tokens_so_far(self, request_id: str) -> int | None:
        return self.tokens.get(request_id)


def merged(spans: list[tuple[int, int]]) -> list[int]:
    """The version of each token."""
    return [version for version, count in spans for _ in range(count)]


@given(data=st.data())
def test_every_token_has_the_version_that_was_committed_when_it_was_made(data: st.DataObject) -> None:
    """Tokens and commits in any order, read in pieces of any size."""
    engine: Any = Engine()
    rollouts = Rollouts(engine, 1)
    track = rollouts._running["r"] = Track(marks=[(0, 1)])
    made: list[int] = []
    read: list[int] = []
    for step in data.draw(st.lists(st.sampled_from(["token", "commit", "add", "read"]), max_size=40)):
        if step == "add":
            track.added = True
            engine.tokens.setdefault("r", 0)
        elif step == "token" and track.added:
            made.append(rollouts.version)
            engine.tokens["r"] = len(made)
        elif step == "commit":
            rollouts.advance(rollouts.version + 1)
        elif step == "read" and len(made) > len(read):
            upto = data.draw(st.integers(len(read) + 1, len(made)))
            spans = track.spans(len(read), upto)
            assert sum(count for _, count in spans) == upto - len(read)
            assert all(count > 0 for _, count in spans)
            assert [version for version, _ in spans] == sorted({version for version, _ in spans})
            read += merged(spans)
    assert read == made[: len(read)]
    assert merged(track.spans(0, len(made))) == made


def test_a_request_that_has_ended_keeps_its_versions() -> None:
    """Its last tokens wait to be read while the next version is committed."""
    engine: Any = Engine()
    rollouts = Rollouts(engine, 4)
    track = rollouts._running["r"] = Track(added=True, marks=[(0, 4)])
    engine.tokens["r"] = None  # vLLM has forgotten it
    rollouts.advance(5)
    assert track.spans(0, 7) == [(4, 7)]


def test_a_request_on_its_way_into_the_engine_is_of_the_version_it_will_start_with() -> None:
    engine: Any = Engine()
    rollouts = Rollouts(engine, 4)
    track = rollouts._running["r"] = Track(marks=[(0, 4)])
    rollouts.advance(5)
    assert track.spans(0, 7) == [(5, 7)]


async def test_what_is_to_be_of_one_version_ends_at_a_commit_with_what_it_has() -> None:
    engine: Any = Engine()
    rollouts = Rollouts(engine, 4)
    tracks = {
        name: Track(added=True, one_version=name != "goes on", marks=[(0, 4)])
        for name in ("under way", "goes on", "has ended", "has no token")
    }
    rollouts._running |= tracks
    engine.tokens = {"under way": 3, "goes on": 3, "has ended": None, "has no token": 0}
    rollouts.advance(5)
    assert {name for name, track in tracks.items() if track.stopped} == {"under way"}
    await asyncio.sleep(0)
    assert engine.aborted == ["under way"], "before anything else has its turn"
    assert tracks["under way"].spans(0, 3) == [(4, 3)]
    assert tracks["goes on"].spans(0, 5) == [(4, 3), (5, 2)]
    assert tracks["has ended"].spans(0, 7) == [(4, 7)]
    assert tracks["has no token"].spans(0, 2) == [(5, 2)]


def test_the_cache_is_kept_where_all_that_runs_may_go_on_upon_it_and_nobody_else_finds_it() -> None:
    engine: Any = Engine()
    config = SimpleNamespace(is_multimodal_model=False, is_encoder_decoder=False)
    engine.llm.vllm_config = SimpleNamespace(model_config=config)
    rollouts = Rollouts(engine, 4)
    request = Request("r", {"prompt_token_ids": [1]}, SimpleNamespace(structured_outputs=None))

    def salt() -> str | None:
        return rollouts._input(request).get("cache_salt")

    assert not rollouts.keep_cache(), "nothing runs: there is nothing to keep"
    rollouts._running = {"a": Track(keeps_cache=True), "b": Track()}
    assert not rollouts.keep_cache()
    assert salt() is None
    rollouts._running = {"a": Track(keeps_cache=True), "b": Track(keeps_cache=True)}
    salts = []
    for _ in range(2):
        assert rollouts.keep_cache()
        salts.append(salt())
    assert len({None, *salts}) == 3
    assert request.prompt == {"prompt_token_ids": [1]}
    config.is_multimodal_model = True
    assert not rollouts.keep_cache(), "what a picture was made into is found by the picture alone"


def test_no_tokens_have_no_spans() -> None:
    assert Track(marks=[(0, 1)]).spans(0, 0) == []
    assert Track(marks=[(0, 1), (3, 2)]).spans(3, 3) == []


def test_the_version_is_the_last_one_committed() -> None:
    rollouts = Rollouts(SimpleNamespace(), 1)  # type: ignore[arg-type]
    rollouts.advance(2)
    assert rollouts.version == 2
