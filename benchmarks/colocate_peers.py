"""What others do with one GPU, each in a process of its own. One line of JSON on standard output.

python -m benchmarks.colocate_peers trl MODEL        TRL's colocate mode: an engine in the trainer's process
python -m benchmarks.colocate_peers ipc MODEL        vLLM's own IPC weight transfer, to an engine in another process
python -m benchmarks.colocate_peers generate MODEL LOADER
                                                     an engine alone, with vLLM's loader (auto) or Tandem's
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROUNDS, WARM_UPS, percentiles
from benchmarks.workload import Workload

#: For all engines alike.
ENGINE: dict[str, Any] = {"kv_cache_memory_bytes": 4 << 30, "max_model_len": 2048, "max_num_seqs": 256}
WORK = Workload(n_prompts=256, prompt_tokens=128, new_tokens=128)
_GENERATIONS = 3


def main(kind: str, model: str, *more: str) -> dict[str, Any]:
    """Measure one of them."""
    before = used()
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"trl": trl, "ipc": ipc, "generate": generate}
    found = kinds[kind](model, *more)
    held: int = found.pop("used") - before
    return found | {"held_bytes": held}


def used() -> int:
    """Bytes of the device that are in use, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def trl(path: str) -> dict[str, Any]:
    """TRL's own `sync_weights`, a `load_weights` for each tensor; and the same in one call."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from transformers import AutoTokenizer

    theirs: Any = importlib.import_module("trl.generation.vllm_generation")

    # Its cache is a part of the device; a number of bytes makes it as large as the others'.
    theirs.LLM = functools.partial(theirs.LLM, kv_cache_memory_bytes=ENGINE["kv_cache_memory_bytes"])
    policy = trainers_model(path)
    generation = theirs.VLLMGeneration(
        model=policy,
        accelerator=Accelerator(),
        processing_class=AutoTokenizer.from_pretrained(path),
        mode="colocate",
        max_model_length=ENGINE["max_model_len"],
        max_num_seqs=ENGINE["max_num_seqs"],
    )
    model = generation.llm.llm_engine.model_executor.driver_worker.model_runner.model

    def one_call() -> None:
        model.load_weights((name, parameter.data) for name, parameter in policy.named_parameters())
        generation.llm.reset_prefix_cache()

    found: dict[str, Any] = {"sync_per_tensor": timed(generation.sync_weights), "used": used()}
    return found | {"sync_one_call": timed(one_call)}


def ipc(path: str) -> dict[str, Any]:
    """Every tensor's CUDA IPC handle in one call, which copies each from there."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # it pickles the handles
    _have_ray()
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    module: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
    llm = LLM(path, **ENGINE, weight_transfer_config=WeightTransferConfig(backend="ipc"))
    llm.init_weight_transfer_engine({"init_info": {}})
    policy = trainers_model(path)

    def send(info: Any) -> None:
        llm.update_weights({"update_info": dataclasses.asdict(info)})

    def sync(packed: bool) -> None:
        llm.start_weight_update()
        tensors = ((name, parameter.data) for name, parameter in policy.named_parameters())
        arguments = module.IPCTrainerSendWeightsArgs(send_mode=send, packed=packed)
        module.IPCWeightTransferEngine.trainer_send_weights(tensors, arguments)
        llm.finish_weight_update()
        llm.reset_prefix_cache()

    found: dict[str, Any] = {"sync_handles": timed(lambda: sync(False)), "used": used()}
    return found | {"sync_packed": timed(lambda: sync(True))}


def _have_ray() -> None:
    """vLLM's module imports Ray at its head, and uses it where the engine is an actor of Ray's alone."""
    if importlib.util.find_spec("ray") is None:
        folder = tempfile.mkdtemp()
        Path(folder, "ray.py").write_text("def is_initialized():\n    return False\n")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, folder)


def generate(path: str, loader: str) -> dict[str, Any]:
    """Tokens a second of vLLM's offline engine, with logprobs."""
    from vllm import LLM, SamplingParams

    ours: dict[str, Any] = {
        "load_format": "tandem",
        "worker_extension_cls": "inference_service.worker.TandemWorker",
    }
    llm = LLM(path, **ENGINE, **({} if loader == "auto" else ours))
    sampling = SamplingParams(max_tokens=WORK.new_tokens, ignore_eos=True, logprobs=0, detokenize=False)
    rates = []
    for seed in range(_GENERATIONS + 1):
        prompts: Any = [{"prompt_token_ids": ids} for ids in WORK.prompts(seed)]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        WORK.check(sum(len(output.outputs[0].token_ids) for output in outputs))
        rates.append(WORK.tokens / seconds)
    return {"tokens_per_s": percentiles(rates[1:]), "used": used()}


def trainers_model(path: str) -> Any:
    """The policy in bf16 on the device."""
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return policy.to("cuda")


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a call, until the device is done."""
    took = []
    for _ in range(WARM_UPS + ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append((time.perf_counter() - begin) * 1e3)
    return percentiles(took[WARM_UPS:])


if __name__ == "__main__":
    # Engines print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(main(*sys.argv[1:])), file=answers, flush=True)
    os._exit(0)
