"""vLLM's own greedy rollouts, by its offline LLM with its own loader: `python -m tests.integration.vllm_reference`.

Standard input: {"models": {name: folder}, "prompts": [[token id]], "max_tokens": int, "engine": {argument: value}}.
Standard output, last line: {name: [{"token_ids": [int], "margins": [float], "logprobs": [float]}]}; a margin is the
distance between the logprobs of the two most probable tokens, and the logprobs are of the prompt's tokens after the
first, if "logprobs": true was asked for.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, logprobs=2)
    if asked.get("logprobs"):
        sampling.prompt_logprobs = 0
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    engines, answer = [], {}
    for name, folder in asked["models"].items():
        engines.append(LLM(folder, disable_log_stats=True, **asked["engine"]))  # the end of one ends them all
        answer[name] = []
        for output in engines[-1].generate(prompts, sampling, use_tqdm=False):
            completion = output.outputs[0]
            best = [sorted((p.logprob for p in at.values()), reverse=True) for at in completion.logprobs]
            read = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
            answer[name].append(
                {
                    "token_ids": list(completion.token_ids),
                    "margins": [a - b for a, b, *_ in best],
                    "logprobs": [at[token].logprob for token, at in read if at],
                }
            )
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
