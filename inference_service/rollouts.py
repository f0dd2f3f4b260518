"""Rollouts and scores out of the engine, each token with the weight version that made it. Knows nothing of gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from inference_service.engine import Engine
from inference_service.loras import Adapter
from inference_service.refusals import named
from tandem.errors import Reason, TandemError, Unavailable, invalid

#: Requests of one call that enter or leave the engine in one turn of the event loop. More would hold up everybody else.
_TURN = 16
#: Pieces of one call that wait for its reader.
_READY = 256

#: Parameters that vLLM checks when a request is added, by its names and the contract's.
SAMPLING = ("bad_words", "allowed_token_ids", "logit_bias", "stop_token_ids", "structured_output")
_CONSTRAINT = "sampling.structured_output"


@dataclass
class Request:
    """One rollout, or one sequence to score, to ask the engine for.

    prompt: vLLM's prompt (a TokensPrompt). params: vLLM's SamplingParams, which requests may share. seed: of this one.
    one_version: whether it ends at a commit, with the tokens that it has. keeps_cache: whether it may go on there upon
    what older versions have cached.
    """

    id: str
    prompt: dict[str, Any]
    params: Any
    index: int = 0
    lora: Adapter | None = None
    seed: int | None = None
    one_version: bool = False
    keeps_cache: bool = False


@dataclass
class Track:
    """What is known of a running request: from which token on which version made it."""

    added: bool = False
    one_version: bool = False
    keeps_cache: bool = False
    stopped: bool = False  # at a commit, as it was asked to be
    marks: list[tuple[int, int]] = field(default_factory=list)  # (first token, version)
    error: TandemError | None = None

    def spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """(version, number of tokens) of the runs that tokens `start` to `end` are made of."""
        runs = []
        for (first, version), (last, _) in zip(self.marks, [*self.marks[1:], (end, 0)], strict=True):
            if (count := min(last, end) - max(first, start)) > 0:
                runs.append((version, count))
        return runs


@dataclass
class Piece:
    """What is new of one request."""

    index: int
    output: Any  # vLLM's RequestOutput
    spans: list[tuple[int, int]]
    first: bool
    stopped: bool = False  # by a commit


class Rollouts:
    """Runs requests in the engine, and keeps account of the weight version behind every token."""

    def __init__(self, engine: Engine, version: int) -> None:
        self._engine = engine
        self._version = version
        self._running: dict[str, Track] = {}
        self._failed: TandemError | None = None
        self._epoch = 0  # what is cached in one is for nobody of the next
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def version(self) -> int:
        """The committed weight version."""
        return self._version

    def advance(self, version: int) -> None:
        """From the next token on, tokens are of `version`. The engine must be paused, and is a moment from resuming."""
        stopped = []
        for request_id, track in self._running.items():
            tokens = self._engine.tokens_so_far(request_id)
            if tokens is None:
                if track.added:  # it has ended; its last tokens wait to be read
                    continue
                tokens = 0
            if track.one_version and tokens:
                track.stopped = True
                stopped.append(request_id)
                continue
            if track.marks and track.marks[-1][0] == tokens:
                track.marks.pop()
            track.marks.append((tokens, version))
        self._version = version
        self._failed = None
        if stopped:
            # It has its turn before anything that the engine samples from now on: what that adds, nobody hears of.
            stopping = asyncio.ensure_future(self._engine.llm.abort(stopped))
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)

    def keep_cache(self) -> bool:
        """Whether an engine that stands still for a new version may keep what it has cached: all that it will go on
        with has asked for that. From here on nobody else finds it, which is not to be had for pictures.
        """
        tracks = self._running.values()
        kept = bool(tracks) and all(track.keeps_cache for track in tracks)
        kept = kept and not self._engine.llm.vllm_config.model_config.is_multimodal_model
        self._epoch += kept
        return kept

    async def fail(self, error: TandemError) -> None:
        """End everything that runs with `error`, and what comes until the next version."""
        self._failed = error
        for track in self._running.values():
            track.error = error
        await self._engine.llm.abort(list(self._running))

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[list[Piece], None]:
        """Run `requests` at once; yield what is ready, until all have ended.

        Stopping the iteration aborts what still runs. A reader that lags holds the requests back, not the memory.

        Raises:
            InvalidArgument: vLLM refuses a request.
            Unavailable: the engine died (ENGINE_DEAD) or its weights tore (ENGINE_TORN).
        """
        ready: list[Piece] = []
        some = asyncio.Event()
        room = asyncio.Semaphore(_READY)
        seeded = len(requests) > 1 and requests[0].seed is not None
        # Who gives seeds wants the same again: in the same batches, in the same order.
        entering = _Entrance(1 if seeded else _TURN, len(requests))

        async def one(request: Request) -> None:
            async with aclosing(self._one(request, entering)) as pieces:
                async for piece in pieces:
                    await room.acquire()
                    ready.append(piece)
                    some.set()

        tasks: list[asyncio.Future[None]] = []
        everything: asyncio.Future[Any] = asyncio.Future()

        def ended(_: Any) -> None:
            some.set()
            entering.passed.set()

        try:
            async with self._engine.gathering() if seeded else nullcontext():
                tasks += [asyncio.ensure_future(one(request)) for request in requests]
                everything = asyncio.gather(*tasks)
                everything.add_done_callback(ended)
                if seeded:
                    await entering.passed.wait()
            while ready or not everything.done():
                await some.wait()
                some.clear()
                pieces = ready[:]
                ready.clear()
                if pieces:
                    yield pieces
                for _ in pieces:
                    room.release()
            everything.result()
        finally:
            await _end([*tasks, everything])

    async def score(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Any, int], None]:
        """Score `requests`; yield (index, vLLM's prompt logprobs, weight version) of each as it is ready.

        A request whose prefill an update cut in two, or a pause ended, is scored again: no score is of two versions.
        """

        entering = _Entrance(_TURN, len(requests))

        async def one(request: Request) -> tuple[int, Any, int]:
            for attempt in range(8):
                version = self._version
                again = replace(request, id=f"{request.id}.{attempt}")
                async with aclosing(self._one(again, entering)) as pieces:
                    output = [piece.output async for piece in pieces][-1]
                if output.outputs[0].finish_reason != "abort" and version == self._version:
                    return request.index, output.prompt_logprobs, version
            raise Unavailable(Reason.INTERRUPTED, "the scoring of a sequence was cut short eight times")

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            await _end(tasks)

    async def _one(self, request: Request, entering: _Entrance) -> AsyncGenerator[Piece, None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        track = self._running[request.id] = Track(
            one_version=request.one_version, keeps_cache=request.keeps_cache, marks=[(0, self._version)]
        )
        first, sent, ended = True, 0, False
        using = ExitStack()
        try:
            if request.lora is not None:
                using.enter_context(self._engine.loras.using(request.lora))
            async with entering:
                if self._failed is not None:
                    raise self._failed
                queue = await self._add(request)
            track.added = True
            if track.error is not None:  # it failed while it was being added, so that nobody could abort it
                raise track.error
            while not ended:
                output = queue.get_nowait() or await queue.get()
                if track.error is not None:
                    raise track.error
                ended = output.finished
                tokens = len(output.outputs[0].token_ids)
                if ended and output.outputs[0].finish_reason == "error":
                    raise _given_up(request, sent + tokens)
                stopped = track.stopped and output.outputs[0].finish_reason == "abort"
                yield Piece(request.index, output, track.spans(sent, sent + tokens), first, stopped)
                first, sent = False, sent + tokens
            self._engine.stats.rollouts_finished += 1
        except EngineDeadError as error:
            raise Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again") from error
        finally:
            using.close()
            del self._running[request.id]
            if not ended and not self._engine.dead:
                # By our own id, which is the only one there is if the caller left while it was being added.
                await self._engine.llm.abort(request.id)
            if not self._running:
                self._engine.quiet()

    async def _add(self, request: Request) -> Any:
        lora = request.lora.request if request.lora is not None else None
        params = request.params
        if request.seed is not None:
            params = params.clone()
            params.seed = request.seed
        try:
            prompt = self._input(request)
            return await self._engine.llm.add_request(request.id, prompt, params, lora_request=lora)
        except Exception as error:
            structured = request.params.structured_outputs is not None
            if structured and isinstance(error, RecursionError):
                raise invalid(_CONSTRAINT, "is nested too deeply") from error
            # Most of what vLLM checks this late is what the tokenizer is needed for: grammars.
            refused = named(error, "sampling", SAMPLING, otherwise="structured_output" if structured else "")
            if refused is None:
                raise
            raise refused from error

    def _input(self, request: Request) -> dict[str, Any]:
        """The prompt as vLLM takes it at once, where it can: all else it has a thread make something of.

        Pictures and what comes with an encoder need that, and grammars, since to check one may take long.
        """
        salt = {"cache_salt": str(self._epoch)} if self._epoch else {}
        if request.prompt.keys() != {"prompt_token_ids"} or request.params.structured_outputs is not None:
            return request.prompt | salt
        if self._engine.llm.vllm_config.model_config.is_encoder_decoder:
            return request.prompt | salt
        return {"type": "token", **request.prompt, **salt}


def _given_up(request: Request, tokens: int) -> TandemError:
    """Why the engine ended a request that has `tokens` with an error."""
    # Some constraints pass vLLM's check and are none: it cannot compile them, or they let no token pass. That shows by
    # the first one, and would again. A picture may be what was missing.
    constrained = request.params is not None and request.params.structured_outputs is not None
    if constrained and tokens < 2 and "multi_modal_data" not in request.prompt:
        return invalid(_CONSTRAINT, "the engine can make nothing of it, or nothing fulfils it")
    return Unavailable(Reason.INTERRUPTED, "the engine gave a request up; try again")  # vLLM's word for that


class _Entrance:
    """Where the requests of a call enter the engine, a few in one turn of the event loop."""

    def __init__(self, width: int, count: int) -> None:
        self.passed = asyncio.Event()  # by all
        self._room = asyncio.Semaphore(width)
        self._left = count

    async def __aenter__(self) -> None:
        await self._room.acquire()
        await asyncio.sleep(0)  # to add one may not give up the turn

    async def __aexit__(self, *_: object) -> None:
        self._room.release()
        self._left -= 1
        if self._left == 0:
            self.passed.set()


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    running = [task for task in tasks if not task.done()]
    for start in range(0, len(running), _TURN):
        for task in running[start : start + _TURN]:
            task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
