"""A contender in a process of its own: vLLM's AsyncLLM without a service. JSON lines in, JSON lines out.

python -m benchmarks.inprocess MODEL live      Tandem's loader: the weights as the service has them
python -m benchmarks.inprocess MODEL packed    vLLM's own loader, which on a CPU packs them for speed
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO

from benchmarks.workload import ENGINE, Workload
from inference_service.launch import launch


class Layerwise:
    """vLLM's own way to new weights, in a worker: its layerwise reload, of a checkpoint in the page cache."""

    def bench_layerwise_reload(self, path: str) -> None:
        from pathlib import Path

        from safetensors.torch import load_file
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self.get_model()  # type: ignore[attr-defined]
        initialize_layerwise_reload(model)
        for file in sorted(Path(path).glob("*.safetensors")):
            model.load_weights(load_file(file).items())
        finalize_layerwise_reload(model, self.model_config)  # type: ignore[attr-defined, no-untyped-call]


async def contend(model: str, loader: str, answers: TextIO) -> None:
    """Serve commands from standard input until it ends."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    if loader == "live":
        llm: Any = (await launch(model, ENGINE)).llm
    else:
        own = "benchmarks.inprocess.Layerwise"
        arguments: dict[str, Any] = {"worker_extension_cls": own, "logprobs_mode": "processed_logprobs"}
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **(arguments | ENGINE)))
    names = iter(range(2**62))

    async def one(prompt: list[int], max_tokens: int) -> int:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt_ids = {"prompt_token_ids": prompt}
        (output,) = [output async for output in llm.generate(prompt_ids, params, str(next(names)))]
        return len(output.outputs[0].token_ids)

    print(json.dumps({"ready": True}), file=answers, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        started = time.perf_counter()
        if command["do"] == "generate":
            work = Workload(**command["work"])
            prompts = work.prompts(command["seed"])
            started = time.perf_counter()
            work.check(sum(await asyncio.gather(*[one(prompt, work.new_tokens) for prompt in prompts])))
        else:
            await llm.pause_generation(mode="keep")
            await llm.collective_rpc("bench_layerwise_reload", args=(model,))
            await llm.resume_generation()
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answers, flush=True)
    llm.shutdown()


if __name__ == "__main__":
    # vLLM and its children print what they like: that goes to the log, answers alone to standard output.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(contend(sys.argv[1], sys.argv[2], pipe))
