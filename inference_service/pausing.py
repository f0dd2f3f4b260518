"""Generation stopped and let go on: who holds it, how it is stopped, and in how little time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from inference_service.control import DEATH_S, Control, dead
from inference_service.halt import halted
from inference_service.launch import Launched
from tandem.errors import Aborted, Reason

PauseMode = Literal["keep", "wait", "abort"]

_GATHERING = "gathering"  # who holds it for the moment in which requests come in: nobody is told
_REST_S = 0.02  # how long nothing must have run before the engine is looked at
_RESTS = 64  # how often, after an update, before another


@dataclass(eq=False)
class _Wait:
    """A pause that lets what runs run to its end."""

    who: str
    held: bool = False  # by `who`, before
    drained: asyncio.Future[None] | None = None  # vLLM's answer


class Pausing(Control):
    """The part of an engine that stops its generation. Raised by any method: what `Control` raises of a dead one."""

    def __init__(self, launched: Launched, timeout_s: float) -> None:
        super().__init__(launched, timeout_s)
        self._pausers: set[str] = set()
        self._wait: _Wait | None = None
        self._waiting = asyncio.Lock()  # one pause waits for rollouts at a time
        self._rests, self._settles = 0, False
        #: Whether an update comes beside the live weights. To see the device done would take until it is there.
        self.arriving = False

    @property
    def paused(self) -> bool:
        """Whether anybody holds generation."""
        return bool(self._pausers - {_GATHERING})

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

    async def halt(
        self,
        who: str,
        mode: PauseMode = "keep",
        *,
        settle: bool = False,
        keep_cache: Callable[[], bool] = lambda: False,
    ) -> asyncio.Future[None]:
        """`pause`, but what is cached is forgotten only when the future is done that this returns.

        It is kept where `keep_cache` says so, which is asked once the engine stands still. Of an engine that had
        nothing to do since it last stood still, it waits for nothing.
        """
        self._rests, self._settles = _RESTS, settle
        if mode == "wait":
            await self.pause(who, mode, settle=settle)
            return await self.forget()
        return await self._controlled(self._halt(who, mode, settle, keep_cache))

    async def _halt(
        self, who: str, mode: PauseMode, settle: bool, keep_cache: Callable[[], bool]
    ) -> asyncio.Future[None]:
        if self._rest.lasts(settled=settle):
            self._check_alone(who, mode)
            self._overtake()
            self._pausers.add(who)
        else:
            await self._pause(who, mode, False, settle)
        if keep_cache():
            kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            kept.set_result(None)
            return kept
        return await self.forget()

    async def forget(self) -> asyncio.Future[None]:
        """Have what is cached forgotten by an engine that is stopped, and keep it stopped. Done when the future is."""
        asked = asyncio.ensure_future(
            self.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        )
        await asyncio.sleep(0)  # its message is sent before those of anybody else
        return self._in_background(self._answered(asked))

    async def _answered(self, call: asyncio.Future[None]) -> None:
        await self._until_done(call, self._timeout_s)
        if not call.done():
            call.cancel()
            raise dead()
        call.result()

    def quiet(self) -> None:
        """Nothing that was asked for runs any more. If it stays so, see the engine stand still before it is halted."""
        if self._rests > 0:
            asyncio.get_running_loop().call_later(_REST_S, self._look, self._rest.stirred)

    def _look(self, stirred: int) -> None:
        alone = not (self._pausers or self._wait or self._control.locked() or self.dead or self.arriving)
        if alone and stirred == self._rest.stirred and not self._rest.lasts(settled=self._settles):
            self._rests -= 1
            self._in_background(self._controlled(self._come_to_rest()))

    async def _come_to_rest(self) -> None:
        if self._pausers or self.load() != (0, 0):
            return
        try:
            await self._stand_still("keep", False, self._settles)
        finally:
            await self._settle()

    async def _stand_still(self, mode: PauseMode, clear_cache: bool, settle: bool) -> None:
        stirred = self._rest.stirred
        # Not AsyncLLM.pause_generation: it sleeps for 20 ms to let outputs arrive, where `_drain` waits for them.
        pausing = self.llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)
        await (halted(self.llm, pausing, self._timeout_s) if settle else pausing)
        await self._drain()
        self._rest.began(stirred, settled=settle)

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
            await self._stand_still(mode, clear_cache, settle)
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
                    await asyncio.wait({drained}, timeout=DEATH_S)
                if self.dead:
                    raise dead()
                if self._wait is wait:
                    drained.result()
                    await self._drain()
                if self._wait is not wait:
                    raise overtaken()
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

    async def release(self, who: str) -> None:
        """`resume`, but don't wait for the engine's answer: it is told before whatever is asked of it next."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        releasing = self._in_background(self._controlled(self._release(who, told)))
        await asyncio.wait({releasing, told}, return_when=asyncio.FIRST_COMPLETED)
        if releasing.done():
            releasing.result()

    async def _release(self, who: str, told: asyncio.Future[None] | None = None) -> None:
        if self._wait is not None and self._wait.who == who:
            self._overtake()
        self._pausers.discard(who)
        if not self._pausers and not self.dead:
            resuming = asyncio.ensure_future(self.llm.engine_core.resume_scheduler_async())
            await asyncio.sleep(0)  # then its message is sent
            if told is not None and not told.done():
                told.set_result(None)
            await resuming

    async def _drain(self) -> None:
        """Wait until every token sampled so far has been counted to its request.

        The engine's socket is read in order, so that what was sampled before a pause is in the queue when the pause's
        answer arrives. vLLM's handler takes it from there in slices, and is done with all of it when it waits for more.
        """
        handler, queue = self.llm.output_handler, self.llm.engine_core.outputs_queue
        while handler is not None and not handler.done() and (not queue.empty() or not queue._getters):  # noqa: ASYNC110
            await asyncio.sleep(0)


def overtaken() -> Aborted:
    """The error of a pause that waited for rollouts while somebody decided otherwise about them."""
    return Aborted(
        Reason.LEASE_HELD, "generation was resumed, or stopped otherwise, while rollouts were waited for"
    )
