"""The engine: vLLM's AsyncLLM, and the few verbs that Tandem needs of it. Knows nothing of gRPC.

Supports vLLM 0.26 (GPU hosts) and 0.31 (CPU); where they differ, the code says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from inference_service.stats import EngineStats
from tandem.errors import Aborted, FailedPrecondition, NotFound, Reason, Unavailable, invalid

# vLLM's default is fork, which gRPC's threads don't survive. Read when vLLM is first imported.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

log = structlog.get_logger(__name__)

PauseMode = Literal["keep", "wait", "abort"]

# By name, since these modules belong into the worker processes alone.
_EXTENSION = "inference_service.worker.TandemWorker"
_LOAD_FORMAT = "tandem"

#: Arguments that Tandem must have its way with.
OWN_ARGUMENTS = ("model", "load_format", "worker_extension_cls", "enable_log_requests")
#: Arguments that Tandem has another default for. Logprobs are those of the distribution that was sampled from.
DEFAULTS: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}


@dataclass(frozen=True)
class ModelInfo:
    """What an engine serves."""

    model: str
    engine_id: str
    max_model_len: int
    vocab_size: int
    dtype: str
    logprobs_mode: str
    max_logprobs: int
    vllm_version: str


class Engine:
    """One AsyncLLM with its worker processes. Make it with `start`, end it with `stop`.

    Raised by any method: Unavailable(ENGINE_DEAD) once a process of the engine has died, which is for good.
    """

    def __init__(self, llm: Any, info: ModelInfo, stats: EngineStats) -> None:
        self.llm = llm
        self.info = info
        self.stats = stats
        self.loras: dict[str, Any] = {}
        self.asleep = False
        self._pausers: set[str] = set()
        self._control = asyncio.Lock()  # one control call at a time: vLLM's are not safe against each other
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # fast tokenizers aren't safe in two threads

    @classmethod
    async def start(cls, model: str, arguments: dict[str, Any]) -> Engine:
        """Load `model` with vLLM's engine `arguments`.

        Raises:
            InvalidArgument: vLLM refuses an argument, or there is no such model. Says which and why.
        """
        return await asyncio.get_running_loop().run_in_executor(None, cls._start, model, arguments)

    @classmethod
    def _start(cls, model: str, arguments: dict[str, Any]) -> Engine:
        for name in OWN_ARGUMENTS:
            if name in arguments:
                raise invalid(f"engine.{name}", "the service sets this argument itself")
        if model.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(model)):
            raise invalid("model", f"no folder {model!r}")
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        single = (
            arguments.get("tensor_parallel_size", 1) == 1 and arguments.get("pipeline_parallel_size", 1) == 1
        )
        if current_platform.is_cpu() and single:
            # The worker then lives in the engine's process, as it does on a GPU: one process and five seconds fewer.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            engine_args = AsyncEngineArgs(
                model=os.path.expanduser(model),
                load_format=_LOAD_FORMAT,
                worker_extension_cls=_EXTENSION,
                **(DEFAULTS | arguments),
            )
            config = engine_args.create_engine_config()
        except Exception as error:
            if (refused := refusal(error)) is None:
                raise
            raise invalid("engine", refused) from error
        stats = EngineStats()
        llm = AsyncLLM.from_vllm_config(config, stat_loggers=[stats.logger], disable_log_stats=False)
        model_config = llm.vllm_config.model_config
        info = ModelInfo(
            model=model,
            engine_id=uuid.uuid4().hex,
            max_model_len=model_config.max_model_len,
            vocab_size=model_config.get_vocab_size(),
            dtype=str(model_config.dtype).removeprefix("torch."),
            logprobs_mode=str(model_config.logprobs_mode),
            max_logprobs=model_config.max_logprobs,
            vllm_version=vllm.__version__,
        )
        return cls(llm, info, stats)

    def stop(self) -> None:
        """End the engine's processes. Blocks for a few seconds."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self.llm.shutdown()
        del self.llm  # while Python still works: vLLM's __del__ fails at the interpreter's end

    @property
    def dead(self) -> bool:
        """Whether a process of the engine has died."""
        return bool(self.llm.errored)

    @property
    def paused(self) -> bool:
        """Whether anybody holds generation."""
        return bool(self._pausers)

    @contextlib.asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self._control:
            if self.dead:
                raise Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again")
            try:
                yield
            except EngineDeadError as error:
                raise Unavailable(Reason.ENGINE_DEAD, "the engine died; start the service again") from error

    async def pause(self, who: str, mode: PauseMode = "keep", clear_cache: bool = True) -> None:
        """Stop generation until `who` resumes. Returns once nothing runs and what ran has been handed over.

        Raises:
            Aborted: LEASE_HELD, somebody else holds generation, and letting rollouts run on or ending them would
                reach into that.
        """
        async with self._calling():
            if self._pausers - {who} and mode != "keep":
                raise Aborted(Reason.LEASE_HELD, f"generation is stopped by {min(self._pausers)}: use KEEP, or later")
            self._pausers.add(who)
            try:
                # Not AsyncLLM.pause_generation: it sleeps for 20 ms to let outputs arrive, where `drain` waits for them.
                await self.llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)
                await self._drain()
            except BaseException:
                await self._release(who)
                raise

    async def resume(self, who: str) -> None:
        """Let generation go on, unless somebody else holds it too."""
        async with self._calling():
            await self._release(who)

    async def _release(self, who: str) -> None:
        self._pausers.discard(who)
        if not self._pausers and not self.dead:
            await self.llm.engine_core.resume_scheduler_async()

    async def _drain(self) -> None:
        """Wait until every token sampled so far has been counted to its request.

        The engine's socket is read in order, so that what was sampled before a pause is in the queue when the pause's
        answer arrives. vLLM's handler takes it from there in slices, and lets the loop turn once between two.
        """
        queue = self.llm.engine_core.outputs_queue
        while not queue.empty():
            await asyncio.sleep(0)
        for _ in range(len(self.llm.output_processor.request_states) // 64 + 4):
            await asyncio.sleep(0)

    def tokens_so_far(self, request_id: str) -> int | None:
        """Tokens counted to a request, or None if vLLM doesn't have it: it has ended, or was not added yet."""
        processor = self.llm.output_processor
        for internal in processor.external_req_ids.get(request_id, ()):
            if state := processor.request_states.get(internal):
                return int(state.detokenizer.num_output_tokens())
        return None

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if running requests hold some: then nothing was forgotten."""
        async with self._calling():
            return bool(await self.llm.reset_prefix_cache())

    async def call_workers(self, method: str, *args: Any, timeout: float = 300.0) -> list[Any]:
        """Call a method of each worker; the answers by rank. Generation stands still meanwhile."""
        async with self._calling():
            return list(await self.llm.collective_rpc(method, timeout=timeout, args=args))

    async def sleep(self) -> None:
        """Free the KV cache. The weights stay: they are an arena's, not vLLM's to free."""
        if not self.llm.vllm_config.model_config.enable_sleep_mode:
            raise FailedPrecondition(
                Reason.SLEEP_MODE_OFF, "start the engine with enable_sleep_mode to use Sleep"
            )
        async with self._calling():
            await self.llm.sleep(level=1)
            self.asleep = True

    async def wake_up(self) -> None:
        """Rebuild what `sleep` freed."""
        async with self._calling():
            if self.asleep:
                await self.llm.wake_up()
                self.asleep = False

    async def load_lora(self, name: str, path: str) -> None:
        """Load the adapter in the folder `path`. Loading the same one again changes nothing."""
        from vllm.lora.request import LoRARequest

        if self.llm.vllm_config.lora_config is None:
            raise FailedPrecondition(Reason.LORA_OFF, "start the engine with enable_lora to use adapters")
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise invalid("path", f"no adapter_config.json in {path!r}")
        request = LoRARequest(name, len(self.loras) + int(time.time() * 1000) % 2**30, path)
        async with self._calling():
            try:
                await self.llm.add_lora(request)
            except Exception as error:  # utility calls lose the type on their way
                if self.dead:
                    raise
                raise invalid("path", _one_line(error)) from error
            old, self.loras[name] = self.loras.get(name), request
            if old is not None:
                await self.llm.remove_lora(old.lora_int_id)

    async def unload_lora(self, name: str) -> None:
        """Forget an adapter."""
        async with self._calling():
            await self.llm.remove_lora(self.lora(name).lora_int_id)
            del self.loras[name]

    def lora(self, name: str) -> Any:
        """vLLM's request for a loaded adapter."""
        if name not in self.loras:
            raise NotFound(Reason.LORA_NOT_FOUND, f"no adapter {name!r} is loaded", metadata={"lora": name})
        return self.loras[name]

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens."""
        return await self._in_tokenizer(lambda t: t(text)["input_ids"])

    async def render(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a chat. `options` are those of the tokenizer's apply_chat_template.

        Raises:
            InvalidArgument: the template refuses the chat, or there is none.
        """

        def render(tokenizer: Any) -> Any:
            try:
                return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)[
                    "input_ids"
                ]
            except Exception as error:  # templates are programs: they raise what they like
                raise invalid("chat", _one_line(error)) from error

        return await self._in_tokenizer(render)

    async def _in_tokenizer(self, call: Any) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        if tokenizer is None:
            raise invalid("prompts", "the engine was started without a tokenizer: send token ids")
        return list(await asyncio.get_running_loop().run_in_executor(self._tokenizing, call, tokenizer))


def refusal(error: BaseException) -> str | None:
    """What vLLM says against its input, or None where the error is not the input's.

    0.26 raises ValueErrors; 0.31 a tree of its own, wrapped or not.
    """
    if type(error).__name__ == "EngineGenerateError" and error.__cause__:
        error = error.__cause__
    ours = any(kind.__name__ == "VLLMClientError" for kind in type(error).__mro__)
    if ours or isinstance(error, (ValueError, TypeError, OSError, AssertionError)):
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:2000]
