"""The engine: vLLM's AsyncLLM, and the few verbs that Tandem needs of it. Knows nothing of gRPC.

Supports vLLM 0.26 (GPU hosts) and 0.31 (CPU); where they differ, the code says so.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from inference_service.control import WORKERS_S, T
from inference_service.launch import Launched, launch
from inference_service.loras import Loras, Shapes
from inference_service.pausing import Pausing, overtaken
from inference_service.tokenizing import Tokenizing
from tandem.errors import FailedPrecondition, Reason

_SLEEP = "sleep"  # who holds generation while the engine sleeps


class Engine(Pausing, Tokenizing):
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
        super().__init__(launched, timeout_s)
        self.info = launched.info
        self.loras = Loras(launched.llm)
        self.asleep = False

    @classmethod
    async def start(
        cls,
        model: str,
        arguments: dict[str, Any],
        timeout_s: float = 60.0,
        *,
        reference: str = "",
        fixed: bool = False,
    ) -> Engine:
        """Load `model` with vLLM's engine `arguments`, and the `reference` model. As `launch`, and raises so."""
        return cls(await launch(model, arguments, reference, fixed=fixed), timeout_s)

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

    def tokens_so_far(self, request_id: str) -> int | None:
        """Tokens counted to a request, or None if vLLM doesn't have it: it has ended, or was not added yet."""
        processor = self.llm.output_processor
        for internal in processor.external_req_ids.get(request_id, ()):
            if state := processor.request_states.get(internal):
                return int(state.detokenizer.num_output_tokens())
        return None

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if running requests hold some: then nothing was forgotten."""
        return bool(await self._controlled(self.llm.reset_prefix_cache()))

    async def sleep(self, told: Callable[[], None] = lambda: None) -> int:
        """Free the KV cache, once what runs has ended. The weights stay: they are an arena's, not vLLM's to free.

        Who leaves while rollouts end has changed nothing; from there on it is done to its end, and then `told`.

        Returns:
            Bytes that were freed on the device where it was most; 0 of an engine that slept before.

        Raises:
            FailedPrecondition: SLEEP_MODE_OFF. Aborted: as `pause`, and a wake-up came meanwhile.
        """
        if not self.llm.vllm_config.model_config.enable_sleep_mode:
            raise FailedPrecondition(
                Reason.SLEEP_MODE_OFF, "start the engine with enable_sleep_mode to use Sleep"
            )
        if self.asleep:
            return 0
        # vLLM's own sleep is passed by: its wake-up would let generation go on whoever else holds it.
        await self.pause(_SLEEP, "wait")
        return await self._to_its_end(self._turn(self._sleep(), told))

    async def _sleep(self) -> int:
        if self.asleep:
            return 0
        if _SLEEP not in self._pausers:
            raise overtaken()
        self.asleep = True
        freed: list[int] = await self._call_workers("tandem_sleep")
        return max(freed)

    async def wake_up(self, told: Callable[[], None] = lambda: None) -> None:
        """Rebuild what `sleep` freed, to the end even if the caller leaves, and then `told`."""
        await self._to_its_end(self._turn(self._wake_up(), told))

    async def _wake_up(self) -> None:
        if self.asleep:
            await self._call_workers("tandem_wake_up")
            self.asleep = False
        if _SLEEP in self._pausers:
            await self._release(_SLEEP)

    async def _turn(self, work: Coroutine[Any, Any, T], told: Callable[[], None]) -> T:
        try:
            return await self._controlled(work, WORKERS_S)
        finally:
            told()

    async def load_lora(self, name: str, path: str, policy: Shapes | None = None) -> None:
        """Load the adapter in the folder `path`, in place of any of that name.

        Raises as `Loras.copied` and `Loras.load` do.
        """
        # The caller's folder may be slow: nobody waits for it, and the engine is not blamed.
        async with self.loras.copied(name, path, policy) as adapter:
            self._rest.stir()
            await self._controlled(self.loras.load(name, adapter))

    async def unload_lora(self, name: str) -> None:
        """Forget an adapter. Raises as `Loras.get` does."""
        await self._controlled(self.loras.unload(name))
