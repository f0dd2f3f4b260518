"""What the engine should compute, from transformers' own forward on the trainer's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tandem.inference.v1 import inference_pb2 as pb
from tests.services import Service

#: Largest difference of two logprobs that bf16 arithmetic in another order makes here: 0.1 was seen.
NOISE = 0.25
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
def logprobs(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Of each token after the first, in float32, as the model in bfloat16 gives them."""
    logits = model.to(torch.bfloat16)(torch.tensor([ids])).logits[0].float()
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


def far_from(service: Service, model: nn.Module) -> float:
    """By how much the engine's logprobs differ from the model's."""
    return difference(scores(service), [logprobs(model, ids) for ids in PROMPTS])
