"""What TRL's users rely on, with each algorithm: docs/trainers.md names a test of this file in each cell of its table.

Every test is a real run of a step or two; it looks at what the engine was asked, and at what came of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.runs import ALL, GROUPS, Run
from tests.services import Service
from tests.trainers import PROMPTS, assert_same_bits, logged, reward
from trainer_service.seeds import Call

pytestmark = [
    pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)"),
    pytest.mark.filterwarnings("ignore:You are using '.*', which is an experimental feature"),  # TRL's notice
]

#: For what may depend on it. The others run in colocate mode.
MODES = ["colocate", "server"]


@pytest.fixture
def engine(mixed: Service) -> Service:
    """The service with the checkpoint's weights."""
    mixed.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    return mixed


@pytest.fixture
def run(engine: Service, checkpoints: dict[str, Path], reference: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes a Run of a kind."""
    return lambda kind, **values: Run(kind, engine, [checkpoints["llama"], reference], tmp_path, **values)


@pytest.mark.parametrize("kind", ALL)
def test_structured_outputs(run: Callable[..., Run], kind: str) -> None:
    with run(kind, vllm_structured_outputs_regex="[0-9]{4}") as made:
        assert all(len(text) == 4 and text.isdigit() for text in made.texts())


@pytest.mark.parametrize("kind", ALL)
def test_generation_kwargs(run: Callable[..., Run], kind: str) -> None:
    own = {"stop": ["zz"], "min_tokens": 3, "seed": 7, "logit_bias": {"100": 50.0}}
    if kind in ("nash_md", "xpo"):  # a mixture of logits has no place for it
        del own["logit_bias"]
    with run(kind, generation_kwargs=own, temperature=0.9, top_p=0.95, top_k=200) as made:
        for sampling in made.samplings:
            assert (list(sampling.stop), sampling.min_tokens) == (["zz"], 3)
            assert sampling.temperature == pytest.approx(0.9)
            assert (round(sampling.top_p, 2), sampling.top_k) == (0.95, 200)
        seeds = [sampling.seed for sampling in made.samplings]
        assert seeds[0] == Call(step=0, number=0).seed(7, rank=0)
        assert len(set(seeds)) == len(seeds), "no call draws what another has drawn"


def chats(**columns: Any) -> Dataset:
    rows = 16
    chat = [[{"role": "user", "content": PROMPTS[i % 5]}] for i in range(rows)]
    return Dataset.from_dict({"prompt": chat} | {name: [value] * rows for name, value in columns.items()})


@pytest.mark.parametrize("kind", ALL)
def test_chat_templates(run: Callable[..., Run], kind: str) -> None:
    """Prompts are rendered by the trainer; the rewards get messages."""
    seen: list[Any] = []

    def looked(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **_: Any) -> Any:
        seen.extend(zip(prompts, completions, strict=True))
        return reward(completion_ids)

    with run(kind, train_dataset=chats(), reward_funcs=looked) as made:
        assert all(re.fullmatch(r"<user>.*\n<assistant>", prompt) for prompt in made.prompts())
    for prompt, completion in seen:
        assert [message["role"] for message in [*prompt, *completion]] == ["user", "assistant"]


@pytest.mark.parametrize("kind", GROUPS)
def test_chat_template_kwargs(run: Callable[..., Run], kind: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = "{{ mood }}:" + models.TEMPLATE
    with run(
        kind,
        train_dataset=chats(),
        processing_class=tokenizer,
        chat_template_kwargs={"mood": "glad"},
    ) as made:
        assert all(prompt.startswith("glad:<user>") for prompt in made.prompts())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ALL)
def test_gradient_accumulation(run: Callable[..., Run], kind: str, mode: str) -> None:
    """One version of the weights for all micro-batches of a step."""
    with run(kind, vllm_mode=mode, gradient_accumulation_steps=3, max_steps=2) as made:
        assert made.trainer.state.global_step == 2
        versions = [
            {span.weight_version for group in groups for r in group for span in r.version_spans}
            for groups in made.rollouts
        ]
        assert all(len(one) == 1 for one in versions)
        assert len(set.union(*versions)) == 2


@pytest.mark.parametrize("kind", GROUPS)
def test_steps_per_generation_and_num_iterations(run: Callable[..., Run], kind: str) -> None:
    """Rollouts are made once, for two micro-batches, each of which is learnt from twice."""
    with run(kind, steps_per_generation=2, num_iterations=2, max_steps=4) as made:
        assert made.trainer.state.global_step == 4
        assert made.trainer.vllm_generation.calls == 1
        assert sum(group.n for batch, _ in made.requests for group in batch) == 16


@pytest.mark.parametrize("kind", ALL)
def test_evaluation(run: Callable[..., Run], kind: str) -> None:
    evaluated = Dataset.from_dict({"prompt": PROMPTS[:4]})
    with run(
        kind, eval_dataset=evaluated, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
    ) as made:
        assert len(logged(made.trainer, "eval_loss")) == 1
        names = {name for entry in made.trainer.state.log_history for name in entry}
        assert any(name.startswith("eval_") and "reward" in name for name in names), names


@pytest.mark.parametrize("kind", ALL)
def test_gradient_checkpointing(run: Callable[..., Run], kind: str, engine: Service) -> None:
    with run(
        kind, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ) as made:
        assert made.trainer.model.is_gradient_checkpointing
        made.trainer.vllm_generation.sync_weights()
        assert_same_bits(engine, made.trainer.model)


@pytest.mark.parametrize("kind", ALL)
def test_several_rewards_with_weights(run: Callable[..., Run], kind: str) -> None:
    """The second is a number that the row has; the third does not apply to any."""
    dataset = Dataset.from_dict({"prompt": PROMPTS[:4] * 4, "worth": [1.0, 2.0, 3.0, 4.0] * 4})

    def worth(completions: list[Any], worth: list[float], **_: Any) -> list[float]:
        assert len(worth) == len(completions)
        return worth

    def never(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    values = {"reward_funcs": [worth, never], "reward_weights": [0.5, 2.0], "train_dataset": dataset}
    with run(kind, **values, shuffle_dataset=False) if kind in GROUPS else run(kind, **values) as made:
        name = {"grpo": "reward", "rloo": "reward", "online_dpo": "objective/scores"}.get(kind)
        if name is not None:
            (mean,) = logged(made.trainer, name)
            assert 0.5 <= mean <= 2.0


TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<a>{% for c in m.tool_calls or [] %}<c>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</c>{% endfor %}'
    "{{ m.content or '' }}</a>{% else %}<{{ m.role }}>{{ m.name or '' }} {{ m.content }}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tool_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with a template and a parser for tools."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = TOOLS
    call = {
        "open": "<c>",
        "close": "</c>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    }
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<a>",
        "fields": {"tool_calls": call, "content": {"close_pattern": r"</a>|$", "content": "text"}},
    }
    return tokenizer


CALLS = {
    "vllm_structured_outputs_regex": r'<c>\{"name": "add", "arguments": \{"a": [1-3], "b": [4-6]\}\}</c>',
    "max_completion_length": 120,
    "max_tool_calling_iterations": 1,
}


def test_tools(run: Callable[..., Run]) -> None:
    """The engine calls a function, which the trainer answers; the second turn's prompt has both."""
    added: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add.

        Args:
            a: one.
            b: other.
        """
        added.append((a, b))
        return a + b

    tokenizer = tool_tokenizer()
    with run("grpo", train_dataset=chats(), processing_class=tokenizer, tools=[add], **CALLS) as made:
        assert made.trainer.vllm_generation.calls == 2
        first, second = (batch for batch, _ in made.requests)
        assert sum(group.n for group in first) == sum(group.n for group in second) == len(added) == 8
        continued = [models.tokenizer().decode(list(group.token_ids)) for group in second]
        for text in continued:
            match = re.search(r'"a": (\d), "b": (\d)\}\}</c><eos><tool>add (\d)</><a>$', text)
            assert match, text
            assert int(match[1]) + int(match[2]) == int(match[3])
    assert all(1 <= a <= 3 and 4 <= b <= 6 for a, b in added)
    assert logged(made.trainer, "tools/call_frequency") == [1.0]


class Counter:
    """An environment with one tool, whose reward it owns."""

    def __init__(self) -> None:
        self.total = 0

    def reset(self, **_: Any) -> None:
        self.total = 0

    def add(self, a: int, b: int) -> str:
        """Count.

        Args:
            a: one.
            b: other.
        """
        self.total += a + b
        return str(self.total)

    def get_reward(self) -> float:
        return float(self.total)


def test_environments(run: Callable[..., Run]) -> None:
    """Each rollout has its own, whose reward is the sum that the engine's call made."""
    with run(
        "grpo",
        train_dataset=chats(),
        processing_class=tool_tokenizer(),
        environment_factory=Counter,
        reward_funcs=None,
        **CALLS,
    ) as made:
        sums = [
            sum(json.loads(re.search(r"<c>(.*)</c>", text)[1])["arguments"].values())  # type: ignore[index]
            for text in made.texts()[:8]
        ]
        (mean,) = logged(made.trainer, "rewards/Counter/mean")
        assert mean == pytest.approx(sum(sums) / 8)


def test_rollout_func(run: Callable[..., Run]) -> None:
    """A function of the user's that asks the same engine."""
    asked: list[str] = []

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        asked.extend(prompts)
        rows = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        _, completions, logprobs, _ = trainer.vllm_generation.generate(rows, None, 1)
        single = [[position[0] for position in row] for row in logprobs]
        return {"prompt_ids": rows, "completion_ids": completions, "logprobs": single}

    with run("grpo", rollout_func=rollout_func) as made:
        assert len(asked) == 8
        assert logged(made.trainer, "sampling/sampling_logp_difference/max")[0] < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_importance_sampling_correction(run: Callable[..., Run], temperature: float) -> None:
    """Under the distribution that was sampled from: top_k and the temperature are in the engine's logprobs."""
    with run("grpo", temperature=temperature, max_completion_length=16) as made:
        assert logged(made.trainer, "sampling/sampling_logp_difference/max")[0] < 1e-4
        assert logged(made.trainer, "sampling/importance_sampling_ratio/mean")[0] == pytest.approx(
            1, abs=1e-4
        )


@pytest.mark.parametrize("kind", ALL)
def test_colocate_and_server_give_the_same_numbers(
    run: Callable[..., Run], engine: Service, kind: str
) -> None:
    found = []
    for mode in MODES:
        engine.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
        with run(kind, vllm_mode=mode, max_steps=3, generation_kwargs={"seed": 5}) as made:
            found.append((logged(made.trainer, "loss"), logged(made.trainer, "grad_norm"), made.texts()))
    (losses, norms, texts), others = found
    # The engine's batches are not the same: its logprobs, which GRPO corrects for, are so within rounding.
    assert losses == pytest.approx(others[0], rel=1e-3, abs=1e-5)
    assert norms == pytest.approx(others[1], rel=1e-3)
    assert texts == others[2]
