"""Starting vLLM: its engine arguments checked, its processes begun. Takes seconds, in which the event loop turns."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import uuid
from dataclasses import dataclass
from typing import Any

from inference_service import orphans
from inference_service.expanded import accept_expanded
from inference_service.refusals import named, one_line, unknown
from inference_service.stats import EngineStats
from tandem.errors import invalid

# vLLM's default is fork, which gRPC's threads don't survive. Read when vLLM is first imported.
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

# By name, since these modules belong into the worker processes alone.
_EXTENSION = "inference_service.worker.TandemWorker"
CPU_EXTENSION = "inference_service.cpu_worker.TandemCpuWorker"
_MIXTURE = "inference_service.mixture:Mixture"
#: Where SamplingParams.extra_args has a mixture's coefficient, and VllmConfig.additional_config the reference's folder.
COEFFICIENT = "tandem_mixture_coef"
REFERENCE = "tandem_reference_model"
#: Where VllmConfig.additional_config says that the weights stay as they are loaded.
FIXED = "tandem_fixed"
LOAD_FORMAT = "tandem"

#: Arguments that Tandem must have its way with.
OWN_ARGUMENTS = (
    "model",
    "load_format",
    "worker_extension_cls",
    "enable_log_requests",
    "mm_processor_cache_gb",
)
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
    reference_model: str = ""
    sleep_mode: bool = False


@dataclass(frozen=True)
class Launched:
    """vLLM's AsyncLLM, running."""

    llm: Any
    info: ModelInfo
    stats: EngineStats


async def launch(
    model: str, arguments: dict[str, Any], reference: str = "", *, fixed: bool = False
) -> Launched:
    """Load `model` with vLLM's engine `arguments`, and the `reference` model for mixtures if there shall be one.

    If it is to be `fixed`, its weights take no updates, and lie as vLLM itself has them.
    If the caller is cancelled, the start goes on without it.

    Raises:
        InvalidArgument: vLLM refuses an argument, or there is no such model. Names each.
        RuntimeError: a process of the engine did not start; it wrote why.
    """
    loop = asyncio.get_running_loop()
    launched: asyncio.Future[Launched] = loop.create_future()

    def settle(result: Launched | Exception) -> None:
        if launched.cancelled():
            return
        if isinstance(result, Launched):
            launched.set_result(result)
        else:
            launched.set_exception(result)

    def run() -> None:
        result: Launched | Exception
        try:
            result = _launch(model, arguments, reference, fixed)
        except Exception as error:  # noqa: BLE001  # handed over
            result = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result)

    # Not a thread of an executor: the loop's end would wait for it, and vLLM's start cannot be interrupted.
    threading.Thread(target=run, name="launch", daemon=True).start()
    return await launched


def _launch(model: str, arguments: dict[str, Any], reference: str, fixed: bool) -> Launched:
    for name in OWN_ARGUMENTS:
        if name in arguments:
            raise invalid(f"engine.{name}", "the service sets this argument itself")
    path = _checked(model)
    if reference:
        arguments = _with_reference(arguments, _checked(reference, "reference_model"))
    if fixed:
        arguments = _with_config(arguments, FIXED, True)
    orphans.adopt()
    import vllm
    from vllm.v1.engine.async_llm import AsyncLLM

    config = _config(model, path, arguments)
    stats = EngineStats()
    try:
        llm = AsyncLLM.from_vllm_config(config, stat_loggers=[stats.logger], disable_log_stats=False)
    except RuntimeError as error:
        raise RuntimeError(f"the engine did not start: {one_line(error)}") from error
    model_config = llm.vllm_config.model_config
    if model_config.is_multimodal_model:
        accept_expanded()
    info = ModelInfo(
        model=model,
        engine_id=uuid.uuid4().hex,
        max_model_len=model_config.max_model_len,
        vocab_size=model_config.get_vocab_size(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        logprobs_mode=str(model_config.logprobs_mode),
        max_logprobs=model_config.max_logprobs,
        vllm_version=vllm.__version__,
        reference_model=reference,
        sleep_mode=model_config.enable_sleep_mode,
    )
    return Launched(llm, info, stats)


def _with_reference(arguments: dict[str, Any], reference: str) -> dict[str, Any]:
    if arguments.get("tensor_parallel_size", 1) != 1 or arguments.get("pipeline_parallel_size", 1) != 1:
        raise invalid("reference_model", "only in an engine of one worker")
    processors = [*(arguments.get("logits_processors") or ()), _MIXTURE]
    return _with_config(arguments, REFERENCE, reference) | {"logits_processors": processors}


def _with_config(arguments: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    return arguments | {"additional_config": (arguments.get("additional_config") or {}) | {name: value}}


def _checked(model: str, field: str = "model") -> str:
    """The model as vLLM shall have it. Folders are looked into here: vLLM takes seconds to load, and says less."""
    if not model.startswith(("/", ".", "~")):
        return model
    path = os.path.expanduser(model)
    if not os.path.isdir(path):
        raise invalid(field, f"no folder {model!r}")
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "params.json")):
        raise invalid(field, f"no config.json in {model!r}")
    return path


def _config(model: str, path: str, arguments: dict[str, Any]) -> Any:
    """vLLM's configuration: all that it checks before it begins a process."""
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    if error := unknown(arguments, names, "engine", f"engine argument of vLLM {vllm.__version__}"):
        raise error
    on_cpu = current_platform.is_cpu()
    if on_cpu and all(arguments.get(f"{kind}_parallel_size", 1) == 1 for kind in ("tensor", "pipeline")):
        # The worker then lives in the engine's process, as it does on a GPU: one process and five seconds fewer.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        engine_args = AsyncEngineArgs(
            model=path,
            load_format=LOAD_FORMAT,
            worker_extension_cls=CPU_EXTENSION if on_cpu else _EXTENSION,
            # Its two halves must forget together. An update has the engine's forget, and an image that is then left out
            # of a request, as one that the engine has, would fail it.
            mm_processor_cache_gb=0,
            **(DEFAULTS | arguments),
        )
        config = engine_args.create_engine_config()
    except Exception as error:
        if any(kind.__module__.startswith("huggingface_hub") for kind in type(error).__mro__):
            raise invalid("model", f"cannot get {model!r}: {one_line(error)}") from error
        if (refused := named(error, "engine", names)) is None:
            raise
        raise refused from error
    if config.parallel_config.data_parallel_size > 1:
        # vLLM's client calls the workers of one of its engines only: the others would keep their old weights.
        raise invalid("engine.data_parallel_size", "a service has one engine: start one for each replica")
    return config
