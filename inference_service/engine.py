"""The engine: vLLM's AsyncLLM, and the few verbs that Tandem needs of it. Knows nothing of gRPC.

Supports vLLM 0.26 (GPU hosts) and 0.31 (CPU); where they differ, the code says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import structlog

from inference_service.halt import halted
from inference_service.launch import Launched, launch
from inference_service.loras import Loras, Shapes
from inference_service.tokenizing import Tokenizing
from tandem.errors import Aborted, FailedPrecondition, Reason, Unavailable

log = structlog.get_logger(__name__)

PauseMode = Literal["keep", "wait", "abort"]

_WORKERS_S = 300.0
_SLEEP = "sleep"  # who holds generation while the engine sleeps
_GATHERING = "gathering"  # who holds it for the moment in which requests come in: nobody is told
_DEATH_S = 0.25  # how soon a control call notices that the engine died

T = TypeVar("T")


@dataclass(eq=False)
class _Wait:
    """A pause that lets what runs run to its end."""

    who: str
    held: bool = False  # by `who`, before
    drained: asyncio.Future[None] | None = None  # vLLM's answer


class Engine(Tokenizing):
    """One AsyncLLM with its worker processes. Make it with `start`, end it with `stop`.

    Raised by any method: Unavailable(ENGINE_DEAD) once a process of the engine has died, which is for good.
    """

    def __init__(self, launched: Launched, timeout_s: float = 60.0) -> None:
        """Take over an engine that runs.

        Args:
            launched: the engine.
            timeout_s: seconds after which an engine that answers no control call is taken for dead. Loading weights
                may take longer.
        """
        super().__init__()
        self.llm = launched.llm
        self.info = launched.info
        self.stats = launched.stats
        self.loras = Loras(launched.llm)
        self.asleep = False
        self._stopped = False
        self._timeout_s = timeout_s
        self._hangs = False
        self._pausers: set[str] = set()
        self._control = asyncio.Lock()  # one control call at a time: vLLM's are not safe against each other
        self._wait: _Wait | None = None
        self._waiting = asyncio.Lock()  # one pause waits for rollouts at a time
        self._ending: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls, model: str, arguments: dict[str, Any], timeout_s: float = 60.0, *, reference: str = ""
    ) -> Engine:
        """Load `model` with vLLM's engine `arguments`, and the `reference` model. Raises as `launch` does."""
        return cls(await launch(model, arguments, reference), timeout_s)

    def stop_listening(self) -> None:
        """Take no more outputs: vLLM's handler would report the end of the engine's processes as an error."""
        if self.llm.output_handler is not None:
            self.llm.output_handler.cancel()

    def stop(self) -> None:
        """End the engine's processes. Blocks for a few seconds."""
        self._stopped = True
        self.stop_tokenizing()
        self.loras.close()
        self.llm.shutdown()
        self.llm = None  # now, while Python still works: vLLM's __del__ fails at the interpreter's end

    @property
    def dead(self) -> bool:
        """Whether a process of the engine has died, or hangs."""
        return self._stopped or self._hangs or bool(self.llm.errored)

    @property
    def paused(self) -> bool:
        """Whether anybody holds generation."""
        return bool(self._pausers - {_GATHERING})

    async def _controlled(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Do `work`, which makes control calls, when no other such work is being done.

        vLLM would wait for the answer of a dead engine, or of one that hangs, for ever. One that takes more than
        `seconds`, the engine's timeout if None, is given up. If the caller is cancelled, `work` is, and may undo what
        it did before the next begins.
        """
        try:
            await self._control.acquire()
        except BaseException:
            work.close()
            raise
        try:
            if self.dead:
                work.close()
                raise _dead()
            working = asyncio.ensure_future(work)
            try:
                await self._until_done(working, self._timeout_s if seconds is None else seconds)
            finally:
                if not working.done():
                    working.cancel()
                    await self._until_done(working, self._timeout_s)
            if not working.done():
                raise _dead()
            try:
                return working.result()
            except Exception as error:
                if self.dead:
                    raise _dead() from error
                raise
        finally:
            self._control.release()

    async def _until_done(self, working: asyncio.Future[Any], seconds: float) -> None:
        # In ticks: a loop that was stalled itself may not blame the engine for the time.
        for _ in range(math.ceil(seconds / _DEATH_S)):
            if working.done() or self.dead:
                return
            await asyncio.wait({working}, timeout=_DEATH_S)
        if not working.done():
            log.error("the engine hangs", seconds=seconds)
            self._hangs = True

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`. It goes on where the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._ending.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)

    async def pause(
        self, who: str, mode: PauseMode = "keep", clear_cache: bool = True, *, settle: bool = False
    ) -> None:
        """Stop generation until `who` resumes. Returns once nothing runs and what ran has been handed over.

        With `settle` also once every kernel of the workers is done.

        Raises:
            Aborted: LEASE_HELD, somebody else holds generation, and letting rollouts run on or ending them would
                reach into that; or, while rollouts were waited for, `who` resumed, or anybody paused in their place.
        """
        if mode == "wait":
            await self._run_out(who, clear_cache)
            if settle:
                await self.call_workers("tandem_settle")
        else:
            await self._controlled(self._pause(who, mode, clear_cache, settle))

    @asynccontextmanager
    async def gathering(self) -> AsyncGenerator[None, None]:
        """Goes around adding requests that shall begin together, so that their batches are the same each time.

        What a request is computed beside changes its rounding errors. Where others run, there is no telling beside
        whom, and they are not stopped.
        """
        if self.load() != (0, 0) or self._pausers or self._wait is not None:
            yield
            return
        self._pausers.add(_GATHERING)
        try:
            await self._controlled(self._settle())
            yield
        finally:
            if not self.dead:
                await self._to_its_end(self._controlled(self._gathered()))

    async def _gathered(self) -> None:
        self._pausers.discard(_GATHERING)
        if self._wait is None:  # else who waits has told the scheduler what to do
            await self._settle()

    def held_by(self, who: str) -> bool:
        """Whether `who` holds generation."""
        return who in self._pausers

    def _check_alone(self, who: str, mode: PauseMode) -> None:
        others = self._pausers - {who, _GATHERING}
        if others and mode != "keep":
            raise Aborted(Reason.LEASE_HELD, f"generation is stopped by {min(others)}: use KEEP, or later")

    async def _pause(self, who: str, mode: PauseMode, clear_cache: bool, settle: bool) -> None:
        self._check_alone(who, mode)
        self._overtake()
        held = who in self._pausers
        self._pausers.add(who)
        try:
            # Not AsyncLLM.pause_generation: it sleeps for 20 ms to let outputs arrive, where `_drain` waits for them.
            pausing = self.llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)
            await (halted(self.llm, pausing, self._timeout_s) if settle else pausing)
            await self._drain()
        except BaseException:  # a caller that left, most of all: generation is as it was before
            if not held:
                self._pausers.discard(who)
            await self._settle()
            raise

    async def _run_out(self, who: str, clear_cache: bool) -> None:
        """Pause once what runs has ended. As that may take for ever, other control calls are done meanwhile."""
        self._check_alone(who, "wait")  # before it waits for another's wait to end
        async with self._waiting:
            wait = _Wait(who)
            try:
                drained = await self._controlled(self._begin_wait(wait, clear_cache))
                while not drained.done() and not self.dead:
                    await asyncio.wait({drained}, timeout=_DEATH_S)
                if self.dead:
                    raise _dead()
                if self._wait is wait:
                    drained.result()
                    await self._drain()
                if self._wait is not wait:
                    raise _overtaken()
                self._wait = None
            except BaseException:  # generation is as it was before, as in `_pause`
                if self._wait is wait and self.dead:
                    self._overtake()
                elif self._wait is wait:
                    await self._to_its_end(self._controlled(self._give_up(wait)))
                raise

    async def _begin_wait(self, wait: _Wait, clear_cache: bool) -> asyncio.Future[None]:
        self._check_alone(wait.who, "wait")
        wait.held = wait.who in self._pausers
        self._pausers.add(wait.who)
        self._wait = wait
        wait.drained = asyncio.ensure_future(
            self.llm.engine_core.pause_scheduler_async(mode="wait", clear_cache=clear_cache)
        )
        await asyncio.sleep(0)  # its message is sent before those of the next control call
        return wait.drained

    def _overtake(self) -> None:
        """End the pause that waits for rollouts, if there is one: somebody decides otherwise about them."""
        wait, self._wait = self._wait, None
        if wait is not None and wait.drained is not None:
            wait.drained.cancel()
            if not wait.held:
                self._pausers.discard(wait.who)

    async def _give_up(self, wait: _Wait) -> None:
        if self._wait is wait:  # nobody else did, before this had its turn
            self._overtake()
            await self._settle()

    async def _settle(self) -> None:
        """Have the scheduler do what the holders of generation want."""
        if self.dead:
            return
        if self._pausers:
            await self.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
        else:
            await self.llm.engine_core.resume_scheduler_async()

    async def resume(self, who: str) -> None:
        """Let generation go on, unless somebody else holds it too."""
        await self._controlled(self._release(who))

    async def _release(self, who: str) -> None:
        if self._wait is not None and self._wait.who == who:
            self._overtake()
        self._pausers.discard(who)
        if not self._pausers and not self.dead:
            await self.llm.engine_core.resume_scheduler_async()

    async def _drain(self) -> None:
        """Wait until every token sampled so far has been counted to its request.

        The engine's socket is read in order, so that what was sampled before a pause is in the queue when the pause's
        answer arrives. vLLM's handler takes it from there in slices, and is done with all of it when it waits for more.
        """
        handler, queue = self.llm.output_handler, self.llm.engine_core.outputs_queue
        while handler is not None and not handler.done() and (not queue.empty() or not queue._getters):  # noqa: ASYNC110
            await asyncio.sleep(0)

    def tokens_so_far(self, request_id: str) -> int | None:
        """Tokens counted to a request, or None if vLLM doesn't have it: it has ended, or was not added yet."""
        processor = self.llm.output_processor
        for internal in processor.external_req_ids.get(request_id, ()):
            if state := processor.request_states.get(internal):
                return int(state.detokenizer.num_output_tokens())
        return None

    def load(self) -> tuple[int, int]:
        """How many requests run and how many wait. vLLM counts both when it has made a step, and makes none while
        it is paused: what came since then waits.
        """
        unfinished = int(self.llm.output_processor.get_num_unfinished_requests())
        running = min(self.stats.num_running, unfinished)
        return running, unfinished - running

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if running requests hold some: then nothing was forgotten."""
        return bool(await self._controlled(self.llm.reset_prefix_cache()))

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of each worker; the answers by rank. Generation stands still meanwhile."""
        return list(await self._controlled(self._call_workers(method, *args), _WORKERS_S))

    async def _call_workers(self, method: str, *args: Any) -> list[Any]:
        return list(await self.llm.collective_rpc(method, timeout=_WORKERS_S, args=args))

    async def sleep(self, told: Callable[[], None] = lambda: None) -> None:
        """Free the KV cache, once what runs has ended. The weights stay: they are an arena's, not vLLM's to free.

        Who leaves while rollouts end has changed nothing; from there on it is done to its end, and then `told`.

        Raises:
            FailedPrecondition: SLEEP_MODE_OFF. Aborted: as `pause`, and a wake-up came meanwhile.
        """
        if not self.llm.vllm_config.model_config.enable_sleep_mode:
            raise FailedPrecondition(
                Reason.SLEEP_MODE_OFF, "start the engine with enable_sleep_mode to use Sleep"
            )
        if not self.asleep:
            # vLLM's own sleep is passed by: its wake-up would let generation go on whoever else holds it.
            await self.pause(_SLEEP, "wait")
            await self._to_its_end(self._turn(self._sleep(), told))

    async def _sleep(self) -> None:
        if not self.asleep:
            if _SLEEP not in self._pausers:
                raise _overtaken()
            self.asleep = True
            await self._call_workers("sleep", 1)

    async def wake_up(self, told: Callable[[], None] = lambda: None) -> None:
        """Rebuild what `sleep` freed, to the end even if the caller leaves, and then `told`."""
        await self._to_its_end(self._turn(self._wake_up(), told))

    async def _wake_up(self) -> None:
        if self.asleep:
            await self._call_workers("wake_up")
            self.asleep = False
        if _SLEEP in self._pausers:
            await self._release(_SLEEP)

    async def _turn(self, work: Coroutine[Any, Any, None], told: Callable[[], None]) -> None:
        try:
            await self._controlled(work, _WORKERS_S)
        finally:
            told()

    async def load_lora(self, name: str, path: str, policy: Shapes | None = None) -> None:
        """Load the adapter in the folder `path`, in place of any of that name.

        Raises as `Loras.copied` and `Loras.load` do.
        """
        # The caller's folder may be slow: nobody waits for it, and the engine is not blamed.
        async with self.loras.copied(name, path, policy) as adapter:
            await self._controlled(self.loras.load(name, adapter))

    async def unload_lora(self, name: str) -> None:
        """Forget an adapter. Raises as `Loras.get` does."""
        await self._controlled(self.loras.unload(name))


def _dead() -> Unavailable:
    return Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again")


def _overtaken() -> Aborted:
    return Aborted(
        Reason.LEASE_HELD, "generation was resumed, or stopped otherwise, while rollouts were waited for"
    )
