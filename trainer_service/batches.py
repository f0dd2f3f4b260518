"""A batch of rollouts that is asked of a service: what is wanted of it, and what comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tandem import rpc
from tandem.errors import Internal, Reason, invalid
from tandem.inference.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Wanted:
    """What a call needs of its rollouts, beside how they are sampled.

    logprobs: whether each token's is sent. text: whether the text is. lora: a loaded adapter to sample with.
    min_weight_version: no token is of an older one. version_wait_s: how many seconds the service waits for that version
    before it refuses the call; None for as long as the call may last. one_version: whether rollouts that a commit finds
    under way end there. keep_cache: whether they may go on there upon what the engine has cached of them, which is of
    older versions; they are read anew where not all that runs may. prompt_ids: whether the first rollout of each prompt
    has the prompt's token ids, as the engine has them.
    """

    logprobs: bool = True
    text: bool = False
    lora: str = ""
    min_weight_version: int = 0
    version_wait_s: float | None = None
    one_version: bool = False
    keep_cache: bool = False
    prompt_ids: bool = False

    def request(self, prompts: Sequence[pb.Prompt], sampling: pb.SamplingParams) -> pb.GenerateRequest:
        """The message that asks for it."""
        request = pb.GenerateRequest(
            prompts=prompts,
            sampling=sampling,
            output_mode=pb.OUTPUT_MODE_FINISHED,
            include_text=self.text,
            include_prompt_token_ids=self.prompt_ids,
            no_logprobs=not self.logprobs,
            lora=self.lora,
            min_weight_version=self.min_weight_version,
            on_commit=self._on_commit(),
        )
        if self.version_wait_s is not None:
            request.max_version_wait.FromNanoseconds(round(self.version_wait_s * 1e9))
        return request

    def _on_commit(self) -> pb.OnCommit:
        if self.one_version and self.keep_cache:
            raise invalid("keep_cache", "rollouts of one version end at a commit, and keep nothing")
        if self.one_version:
            return pb.ON_COMMIT_STOP
        return pb.ON_COMMIT_CONTINUE_CACHED if self.keep_cache else pb.ON_COMMIT_UNSPECIFIED


class Sampling:
    """A batch that is under way. Iterate once, for (group, which of its rollouts, the rollout) as they come."""

    def __init__(self, calls: Sequence[tuple[int, Any]]) -> None:
        self._calls = calls  # (index of its first group, stream) of each

    def __iter__(self) -> Iterator[tuple[int, int, pb.Rollout]]:
        with rpc.translated():
            try:
                for start, call in self._calls:
                    for response in call:
                        for rollout in response.rollouts:
                            yield start + rollout.prompt_index, rollout.rollout_index, rollout
            finally:
                self.cancel()

    def cancel(self) -> None:
        """End it, from any thread. Who iterates gets Cancelled."""
        for _, call in self._calls:
            call.cancel()


def complete(done: Sequence[Sequence[pb.Rollout | None]]) -> list[list[pb.Rollout]]:
    """`done`, of which nothing is missing."""
    if missing := sum(rollout is None for group in done for rollout in group):
        raise Internal(Reason.BUG, f"The service ended the stream with {missing} rollouts missing.")
    return [[rollout for rollout in group if rollout is not None] for group in done]
