"""Prompts with images, over a real engine of a tiny model that sees: both sides see the same, and learn from it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText

from tandem.errors import InvalidArgument
from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.integration.test_trainer_pairs import KINDS as PAIRS
from tests.integration.test_trainer_pairs import arguments as pair_arguments
from tests.services import Service, inference_service
from tests.trainers import arguments, assert_same_bits, logged, reward
from trainer_service import trainers
from trainer_service.client import Group, InferenceClient

pytestmark = [
    pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)"),
    pytest.mark.filterwarnings("ignore:You are using '.*', which is an experimental feature"),  # TRL's notice
]

GROUPS = {"grpo": trainers.GRPOTrainer, "rloo": trainers.RLOOTrainer}
KINDS = [*GROUPS, "online_dpo"]
PICTURES = models.processor().image_processor
PLACE, IMAGE = models.PLACE, 260  # an image's tokens, and the one that a prompt may have in their place


def picture(number: int) -> Image.Image:
    """Noise, which no two numbers share."""
    noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def rows(**columns: Any) -> Dataset:
    chat = [[{"role": "user", "content": "ab"}], [{"role": "user", "content": "what is it?"}]] * 6
    images = {"image": [picture(i % 3) for i in range(12)]}
    return Dataset.from_dict({"prompt": chat} | images | columns)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def seeing(checkpoint: Path) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(
            checkpoint,
            Path(folder),
            environment={"HF_MODULES_CACHE": folder},
            dtype="float32",
            trust_remote_code="true",
        ) as service,
    ):
        yield service


@pytest.fixture
def engine(seeing: Service) -> Service:
    """The service with the checkpoint's weights."""
    seeing.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    return seeing


@pytest.fixture
def make(engine: Service, checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer of a kind, and closes it at the end."""

    def made(kind: str, processor: Any = None, **values: Any) -> Any:
        cls = GROUPS[kind] if kind in GROUPS else PAIRS[kind][0]
        configured = arguments if kind in GROUPS else pair_arguments
        return cls(
            model=AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32),
            reward_funcs=reward,
            args=configured(kind, tmp_path, **({"max_steps": 2} | values)),
            train_dataset=rows(),
            processing_class=processor or models.processor(),
            inference_address=engine.address,
        )

    return made


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], completion: list[int], image: Image.Image) -> torch.Tensor:
    """transformers', where no image is sampled."""
    pixels = PICTURES(images=[[image]], return_tensors="pt")
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), **pixels).logits
    logits[..., IMAGE] = -torch.inf
    values = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return values.gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS)
def test_images(make: Callable[..., Any], engine: Service, kind: str, mode: str) -> None:
    """What the engine samples is the policy's, of the row's own image; and the policy learns to see."""
    trainer = make(kind, vllm_mode=mode, generation_kwargs={"logprobs": 0, "temperature": 1.0})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    generation = trainer.vllm_generation
    generate = generation._generate
    seen: set[bytes] = set()
    apart: list[float] = []
    blind: list[float] = []

    def watched(groups: list[Group], sampling: Any) -> Any:
        rollouts = generate(groups, sampling)
        for group, of_group in zip(groups, rollouts, strict=True):
            prompt, (image,) = list(group.token_ids), group.images
            assert [token for token in prompt if token in PLACE] == PLACE
            seen.add(image)
            for rollout in of_group:
                sampled, found = list(rollout.token_ids), torch.tensor(list(rollout.logprobs))
                assert IMAGE not in sampled
                own = logprobs(trainer.model, prompt, sampled, Image.open(io.BytesIO(image)))
                apart.append((found - own).abs().max().item())
            other = logprobs(trainer.model, prompt, sampled, picture(9))
            blind.append((found - other).abs().max().item())
        return rollouts

    generation._generate = watched
    trainer.train()
    assert trainer.policy_weights.transport == {"colocate": "shared", "server": "stream"}[mode]
    assert len(seen) > 1
    assert max(apart) < 1e-3
    assert min(blind) > 1e-2, "with another image the logprobs would be others"
    after = trainer.model.state_dict()
    for part in ("vision_model", "connector", "text_model"):
        assert any(not torch.equal(after[name], old) for name, old in before.items() if part in name), part
    assert len(logged(trainer, "loss")) == 2
    generation.sync_weights()
    assert_same_bits(engine, trainer.model)
    trainer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_template_renders(make: Callable[..., Any], kind: str) -> None:
    """TRL's Online DPO leaves prompts with images to the template of the server."""
    processor = models.processor()
    processor.chat_template = "mine:" + models.SEEING
    trainer = make(kind, processor, max_steps=1)
    generation = trainer.vllm_generation
    generate, prompts = generation._generate, []

    def watched(groups: list[Group], sampling: Any) -> Any:
        prompts.extend(processor.tokenizer.decode(list(group.token_ids)) for group in groups)
        return generate(groups, sampling)

    generation._generate = watched
    trainer.train()
    image = processor.tokenizer.decode(PLACE)
    known = {f"mine:<user>{image}{text}<assistant>" for text in ("ab", "what is it?")}
    assert prompts
    assert set(prompts) <= known
    trainer.close()


def test_an_image_of_another_size_in_tokens_is_refused(make: Callable[..., Any]) -> None:
    """The prompts would not be those that are trained on."""
    processor = models.processor()
    processor.image_seq_len = 5
    trainer = make("grpo", processor)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(InvalidArgument, match="tokens of a prompt with images") as refusal:
        trainer.train()
    assert refusal.value.violations[0].field == "processing_class"
    assert all(map(torch.equal, trainer.model.parameters(), before))
    trainer.close()


def test_a_place_is_one_token_or_as_many_as_the_image_has(engine: Service) -> None:
    """The same prompt either way, and the same rollouts; in a batch, and with two images in one prompt."""
    first, second = (encoded(picture(number)) for number in range(2))
    short = [Group([70, IMAGE, 71], 2, [first]), Group([IMAGE, 80, IMAGE, 90], 1, [second, first])]
    long = [Group([70, *PLACE, 71], 2, [first]), Group([*PLACE, 80, *PLACE, 90], 1, [second, first])]
    sampling = {"max_tokens": 8, "seed": 3, "ignore_eos": True}
    with closing(InferenceClient(engine.address)) as client:
        found = [client.generate(batch, sampling, prompt_ids=True) for batch in (short, long)]
    for rollouts in found:
        assert [list(group[0].prompt_token_ids) for group in rollouts] == [list(g.token_ids) for g in long]
    assert [[list(r.token_ids) for r in group] for group in found[0]] == [
        [list(r.token_ids) for r in group] for group in found[1]
    ]


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
