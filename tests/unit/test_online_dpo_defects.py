"""What is wrong in TRL 1.16's OnlineDPOTrainer with vLLM, on TRL's code; docs/trainers.md names the tests of ours.

A test that fails here says that TRL has mended it: then the claim in docs/trainers.md goes as well.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests import models
from trainer_service._trl_experimental import TrlOnlineDPOTrainer

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|torch)")


class Llm:
    """Stands where vLLM is in TRL's process, and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def wake_up(self, tags: list[str]) -> None:
        self.told.append(f"wake {tags[0]}")

    def sleep(self, level: int) -> None:
        self.told.append(f"sleep {level}")

    def generate(self, prompts: list[Any], *_: Any, **__: Any) -> list[Any]:
        self.told.append(prompts)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 1])] * 2, prompt_token_ids=[9])] * len(
            prompts
        )


class Client:
    """Stands where TRL's HTTP client is."""

    def __init__(self) -> None:
        self.pushed: list[str] = []
        self.chats: list[Any] = []

    def chat(self, messages: list[Any], n: int, **_: Any) -> dict[str, Any]:
        self.chats += messages
        return {"completion_ids": [[5, 1]] * (n * len(messages))}

    def generate(self, prompts: list[str], n: int, **_: Any) -> dict[str, Any]:
        return {"completion_ids": [[5, 1]] * (n * len(prompts))}

    @contextmanager
    def weight_update(self) -> Any:
        yield

    def update_named_param(self, name: str, weights: torch.Tensor) -> None:
        self.pushed.append(name)

    def reset_prefix_cache(self) -> None:
        return


def trl(mode: str, **values: Any) -> Any:
    """TRL's trainer as far as it generates."""
    tokenizer = models.tokenizer()
    trainer = TrlOnlineDPOTrainer.__new__(TrlOnlineDPOTrainer)
    attributes: dict[str, Any] = {
        "vllm_mode": mode,
        "vllm_client": Client(),
        "llm": Llm(),
        "accelerator": Accelerator(cpu=True),
        "processing_class": tokenizer,
        "_tokenizer": tokenizer,
        "eos_token_ids": [1],
        "state": SimpleNamespace(global_step=0, epoch=0.0),
        "_last_loaded_step": 0,
        "generation_config": SimpleNamespace(max_tokens=2),
        "args": SimpleNamespace(generation_kwargs=None, vllm_enable_sleep_mode=False, use_vllm=True),
        "num_generations": 2,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "is_fsdp_enabled": False,
        "model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    }
    trainer.__dict__ |= attributes | values
    return trainer


def test_the_padding_of_prompts_counts_as_text() -> None:
    ids, mask, *_ = trl("server")._generate_vllm(["ab", "longer"])
    assert ids[0, :4].tolist() == [2] * 4, "the shorter prompt is padded"
    assert mask[0, :4].tolist() == [1] * 4


def test_with_sleep_the_second_micro_batch_is_of_discarded_weights() -> None:
    """Level 2 discards the weights; they are pushed again in the next step only."""
    trainer = trl("colocate", _last_loaded_step=-1)
    trainer.args.vllm_enable_sleep_mode = True
    trainer._move_model_to_vllm = lambda: trainer.llm.told.append("push")
    for _ in range(2):
        trainer._generate_vllm_colocate(["ab"])
    awake = ["wake kv_cache", ["ab"], "sleep 2"]
    assert trainer.llm.told == ["wake weights", "push", *awake, "wake weights", *awake]


def test_each_rank_of_a_tensor_parallel_engine_gives_it_other_prompts() -> None:
    trainer = trl("colocate", vllm_tensor_parallel_size=2)
    trainer._generate_vllm_colocate(["of this rank"])
    assert trainer.llm.told == [["of this rank"]]


def test_the_loss_does_not_see_the_images() -> None:
    seen: list[Any] = []

    def forward(*arguments: Any) -> None:
        seen.append(arguments[-1])
        raise InterruptedError

    ids = torch.ones(2, 2, dtype=torch.long)
    trainer = trl("server", _generate_vllm=lambda *_: (ids, ids, ids, ids), _forward=forward)
    with pytest.raises(InterruptedError):
        trainer.training_step(nn.Linear(1, 1), {"prompt": ["a"], "image": [object()]})
    assert seen == [None]


def test_the_template_of_prompts_with_images_is_the_servers() -> None:
    """The loss is over prompts that the trainer renders; what is sampled from are messages, which the server does."""
    image = object()
    trainer = trl("server")
    trainer.processing_class.chat_template = "mine:" + models.TEMPLATE
    ids, *_ = trainer._generate_vllm([[{"role": "user", "content": "ab"}]], [image])
    assert models.tokenizer().decode(ids[0]).startswith("mine:")
    ((message,),) = trainer.vllm_client.chats
    assert message["content"] == [{"type": "image", "image": image}, {"type": "text", "text": "ab"}]


def test_every_parameter_is_a_push_of_its_own() -> None:
    trainer = trl("server")
    trainer._move_model_to_vllm()
    assert trainer.vllm_client.pushed == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_list_of_betas_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="indices must be integers"):
        _ = trl("server", _beta=[0.1, 0.2]).beta
