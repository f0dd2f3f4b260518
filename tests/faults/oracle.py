"""What the engine should compute, from transformers' own forward on the trainer's weights."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tandem import rpc
from tandem.engine.v1 import engine_pb2
from tandem.errors import TandemError
from tandem.inference.v1 import inference_pb2 as pb
from tests.services import Service

#: Largest difference of two logprobs that bf16 arithmetic in another order makes here:
#: 0.26 was seen of PROMPTS.
NOISE = 0.5
#: The same of float32 arithmetic.
EXACT = 2e-3
#: Smallest difference that counts as another policy.
OTHER = 1.0

PROMPTS = [[0, 40, 41, 42, 43, 44, 45, 46], [0, 100, 7, 55, 201, 33], [0, *range(60, 100)]]


def model_of(checkpoint: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.eval()


def tensors_of(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The policy's tensors, under their names in the checkpoint, in another order than the manifest's."""
    state = model.state_dict(keep_vars=True)
    return {name: state[name].detach() for name in sorted(names, reverse=True)}


def perturb(model: nn.Module, seed: int) -> None:
    """Another policy, in place: every parameter changes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (0.05 * noise).to(parameter.dtype)


@torch.no_grad()
def become(model: nn.Module, other: nn.Module) -> None:
    """Write `other`'s parameters over the model's, wherever these are."""
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        mine.copy_(wanted)


@torch.no_grad()
def logprobs(model: nn.Module, ids: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Of each token after the first, in float32, as the model in the engine's dtype gives them."""
    logits = model.to(dtype)(torch.tensor([ids])).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def scores(service: Service, sequences: Sequence[Sequence[int]] = PROMPTS) -> list[torch.Tensor]:
    """What the engine says of `sequences`."""
    request = pb.ScoreRequest(sequences=[pb.TokenIds(ids=ids) for ids in sequences])
    found: dict[int, torch.Tensor] = {}
    for response in service.inference.Score(request, timeout=60):
        found |= {score.sequence_index: torch.tensor(score.logprobs) for score in response.scores}
    return [found[i] for i in range(len(sequences))]


def difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def far_from(service: Service, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> float:
    """By how much the engine's logprobs differ from the model's."""
    return difference(scores(service), [logprobs(model, ids, dtype) for ids in PROMPTS])


def generated(service: Service) -> int:
    """Tokens that the engine has sampled, those that nobody has read yet too."""
    return int(service.engine.GetStats(engine_pb2.GetStatsRequest(), timeout=10).tokens_generated)


class Rollouts:
    """Rollouts of PROMPTS, read as they are sampled in a thread of their own.

    Once each rollout has `stop` tokens, the engine's processes stand still until `thaw`: what is asked of the engine
    before that finds the rollouts running, however slow this process is.
    """

    def __init__(
        self,
        service: Service,
        max_tokens: int = 200,
        timeout: float = 60,
        stop: int = 0,
        on_commit: pb.OnCommit = pb.ON_COMMIT_UNSPECIFIED,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in PROMPTS]
        self.logprobs: list[list[float]] = [[] for _ in PROMPTS]
        self.spans: list[list[tuple[int, int]]] = [[] for _ in PROMPTS]
        self.finish: list[str] = [""] * len(PROMPTS)
        self.error: TandemError | None = None
        self._some = threading.Condition()
        self._service = service
        self._engine = service.children()
        self._max_tokens = max_tokens
        self._before = generated(service)
        self._stop = stop
        self._frozen = False
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=ids)) for ids in PROMPTS],
            sampling=pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=7),
            output_mode=pb.OUTPUT_MODE_DELTAS,
            on_commit=on_commit,
        )
        self._call = service.inference.Generate(request, timeout=timeout)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with rpc.translated():
                for response in self._call:
                    with self._some:
                        for rollout in response.rollouts:
                            self._add(rollout)
                        if self._stop and min(map(len, self.tokens)) >= self._stop:
                            self._stop, self._frozen = 0, True
                            self._signal(signal.SIGSTOP)
                        self._some.notify_all()
        except TandemError as error:
            self.error = error

    def _add(self, rollout: pb.Rollout) -> None:
        i = rollout.prompt_index
        self.tokens[i] += rollout.token_ids
        self.logprobs[i] += rollout.logprobs
        self.spans[i] += [(span.weight_version, span.num_tokens) for span in rollout.version_spans]
        if rollout.finish_reason:
            self.finish[i] = pb.FinishReason.Name(rollout.finish_reason).removeprefix("FINISH_REASON_")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._engine:
            with contextlib.suppress(ProcessLookupError):  # a test may have killed it
                os.kill(pid, number)

    def stop_again(self, more: int) -> None:
        """Stop anew once the rollout that has fewest tokens has so many more."""
        with self._some:
            self._stop = min(map(len, self.tokens)) + more

    def frozen(self, latest: int | None = None) -> bool:
        """Wait for the stop. False if it came after `latest` tokens of a rollout: by default so late that the rollouts
        may end before they meet anything.
        """
        latest = self._max_tokens - 60 if latest is None else latest
        with self._some:
            found = self._some.wait_for(lambda: self._frozen or any(self.finish), 60)
            assert found
            in_time = self._frozen and not any(self.finish)
        sampled = generated(self._service) - self._before
        if in_time and sampled < len(PROMPTS) * latest:
            return True
        self.thaw()
        return False

    def thaw(self) -> None:
        with self._some:
            self._frozen = False
            self._signal(signal.SIGCONT)

    def wait_for(self, count: int) -> None:
        """Wait until each rollout has `count` tokens."""
        with self._some:
            assert self._some.wait_for(lambda: min(map(len, self.tokens)) >= count, 60)

    def join(self) -> None:
        """Wait for the end of all."""
        self.thaw()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def by_version(self, i: int) -> dict[int, int]:
        """How many tokens of a rollout each version sampled. They are in order, and add up."""
        versions = [version for version, _ in self.spans[i]]
        assert versions == sorted(versions)
        counts: dict[int, int] = {}
        for version, count in self.spans[i]:
            counts[version] = counts.get(version, 0) + count
        assert sum(counts.values()) == len(self.tokens[i]) == len(self.logprobs[i])
        return counts

    def assert_sampled_by(self, models: dict[int, nn.Module]) -> None:
        """Each token's logprob is that of the one version that it names, after everything before it, in float32."""
        for i, prompt in enumerate(PROMPTS):
            done = 0
            for version, count in self.by_version(i).items():
                expected = logprobs(models[version], prompt + self.tokens[i], torch.float32)[
                    len(prompt) - 1 :
                ]
                here = torch.tensor(self.logprobs[i][done : done + count])
                distance = (here - expected[done : done + count]).abs().max()
                assert distance < EXACT, f"a token is not of version {version}"
                done += count
