"""GRPO and RLOO over a real engine: the right weights, and the right rollouts."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tandem.errors import InvalidArgument, Reason
from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.integration.test_architectures import logprobs
from tests.services import Service, inference_service
from tests.trainers import (
    arguments,
    assert_same_bits,
    logged,
    make,
    model_of,
    prompts,
    reward,
)
from trainer_service import trainers
from trainer_service.client import InferenceClient

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture(scope="module")
def service(checkpoints: dict[str, Path]) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(checkpoints["llama"], Path(folder)) as service,
    ):
        yield service


@pytest.fixture
def engine(service: Service) -> Service:
    """The service with the checkpoint's weights."""
    service.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    return service


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("mode", "dtype", "transport"),
    [
        ("colocate", "bfloat16", "aliased"),
        ("colocate", "float32", "written"),
        ("server", "float32", "stream"),
    ],
)
def test_a_run_keeps_the_engine_at_the_trainers_bits(
    engine: Service,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    kind: str,
    mode: str,
    dtype: str,
    transport: str,
) -> None:
    model = model_of(checkpoints["llama"], getattr(torch, dtype))
    trainer = make(kind, engine, model, tmp_path, vllm_mode=mode, max_steps=5)
    trainer.train()
    weights = trainer.policy_weights
    assert (weights.transport, weights.aliased) == (
        "stream" if transport == "stream" else "shared",
        transport == "aliased",
    )
    summed = any("kahan_comp" in state for state in trainer.optimizer.state.values())
    assert summed == (dtype == "bfloat16")
    nbytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    moved = [update.nbytes for update in weights.history]
    # An aliased run moves the weights once, when the parameters become the engine's memory.
    assert moved == ([nbytes, 0, 0, 0, 0, 0] if transport == "aliased" else [nbytes] * 5)
    versions = [update.weight_version for update in weights.history]
    assert versions == list(range(versions[0], versions[0] + len(versions)))
    if transport != "aliased":
        trainer.vllm_generation.sync_weights()  # the last step's: nothing was generated from it
    assert_same_bits(engine, model)
    assert logged(trainer, "tandem/weight_version")[-1] == versions[-1]
    assert all(value > 0 for value in logged(trainer, "tandem/sync_ms"))
    assert set(logged(trainer, f"tandem/transport/{weights.transport}")) == {1}
    assert set(logged(trainer, "tandem/aliased")) == {transport == "aliased"}
    assert all(value > 0 for value in logged(trainer, "tandem/tokens_per_second"))
    if transport == "aliased":
        assert logged(trainer, "tandem/bytes_moved")[1:] == [0] * 4
    if kind == "grpo":
        # The engine's logprobs of its rollouts are those of the policy, before each of the five updates.
        assert all(value < 0.05 for value in logged(trainer, "sampling/sampling_logp_difference/mean"))
        assert len(logged(trainer, "sampling/sampling_logp_difference/mean")) == 5
    assert_logprobs_agree(trainer, checkpoints["llama"])  # after the fifth
    trainer.close()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_run_that_sends_what_changed_alone(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_INFERENCE_SPARSE", "1")
    model = model_of(checkpoints["llama"], torch.float32)
    trainer = make("grpo", engine, model, tmp_path, vllm_mode="server", max_steps=3, learning_rate=1e-6)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    assert_same_bits(engine, model)
    first, *rest = trainer.policy_weights.history
    assert first.changed is None
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert all(0 < update.changed < numel for update in rest)
    assert all(update.nbytes < first.nbytes for update in rest)
    assert logged(trainer, "tandem/elements_changed") == [float(update.changed) for update in rest[:2]]
    assert all(value < 0.05 for value in logged(trainer, "sampling/sampling_logp_difference/mean"))
    trainer.close()


@pytest.mark.parametrize(("name", "value"), [("SPARSE", "yes"), ("UPDATE_MODE", "sideways")])
def test_a_variable_that_says_nothing_is_named(
    engine: Service,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(f"TANDEM_INFERENCE_{name}", value)
    with pytest.raises(InvalidArgument, match=value) as raised:
        make("grpo", engine, model_of(checkpoints["llama"], torch.float32), tmp_path, vllm_mode="server")
    assert [violation.field for violation in raised.value.violations] == [f"TANDEM_INFERENCE_{name}"]


@torch.no_grad()
def assert_logprobs_agree(trainer: Any, checkpoint: Path) -> None:
    """The engine's logprobs, of rollouts and of scores, are the model's within what bfloat16 costs: they are no
    further from it in bfloat16 and in float32 than these are from each other. The factors are those of
    test_architectures."""
    dice = random.Random(0)
    prompts = [[dice.randrange(3, 259) for _ in range(n)] for n in (1, 2, 3, 5, 8, 13, 40, 100, 150, 200)]
    generation = trainer.vllm_generation
    generation.generation_kwargs = {"ignore_eos": True, "seed": 3, "max_tokens": 48, "logprobs": 0}
    _, completions, sampled, _ = generation.generate(prompts, None, 1)
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    scores = generation.client.score(sequences)
    coarse, fine = (model_of(checkpoint, dtype).eval() for dtype in (torch.bfloat16, torch.float32))
    coarse.load_state_dict(trainer.model.state_dict())
    fine.load_state_dict(coarse.state_dict())  # the engine's weights, which are rounded
    own, scored, noise = [], [], []
    for prompt, sequence, rollout, score in zip(prompts, sequences, sampled, scores, strict=True):
        expected = [logprobs(m, sequence, 1) for m in (coarse, fine)]
        begin = len(prompt) - 1
        own.append(torch.stack([torch.tensor(rollout)[:, 0] - e[begin:] for e in expected]))
        scored.append(torch.stack([torch.tensor(list(score.logprobs)) - e for e in expected]))
        noise.append(expected[0] - expected[1])
    cost = torch.cat(noise)
    assert 0.001 < cost.abs().mean() < 0.1
    for apart in (torch.cat(own, -1), torch.cat(scored, -1)):
        assert apart.abs().mean(-1).max() < 1.3 * cost.abs().mean()
        assert apart.abs().max() < 2 * cost.abs().max()
        assert apart.mean(-1).abs().max() < 0.3 * cost.abs().mean()


def test_a_session_ends_with_the_trainer_and_the_model_lives_on(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(checkpoints["llama"], torch.bfloat16)
    trainer = make("grpo", engine, model, tmp_path / "a")
    trainer.train()
    held = engine.weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=True)).digest
    trainer.close()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert engine.weights.GetWeightVersion(pb.GetWeightVersionRequest(include_digest=True)).digest == held
    second = make("grpo", engine, model_of(checkpoints["llama"], torch.bfloat16), tmp_path / "b")
    second.train()
    second.close()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_lora_reaches_the_engine_merged(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    model = model_of(checkpoints["llama"], torch.float32)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make(
        "grpo",
        engine,
        model,
        tmp_path,
        vllm_mode=mode,
        learning_rate=0.05,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    sequence = [5, 17, 99, 200, 44, 7, 120]
    client = InferenceClient(engine.address)
    (before,) = client.score([sequence])
    trainer.train()
    trainer.vllm_generation.sync_weights()
    (after,) = client.score([sequence])
    with torch.no_grad():
        logits = trainer.model(torch.tensor([sequence])).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
    assert (torch.tensor(after.logprobs) - expected).abs().max() < 0.15
    assert (torch.tensor(before.logprobs) - expected).abs().max() > 0.5, "training changed nothing: no test"
    assert_same_bits(engine, trainer.model)
    trainer.close()
    client.close()
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name


def test_rows_of_a_group_that_differ_get_rollouts_of_their_own(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(checkpoints["llama"], torch.bfloat16)
    trainer = make("grpo", engine, model, tmp_path, temperature=1e-6)
    trainer.vllm_generation.sync_weights()
    rows = [[10, 20, 30], [40, 50], [10, 20, 30], [60, 70, 80]]
    together = trainer.vllm_generation.generate(rows, None, num_generations=4)
    alone = [trainer.vllm_generation.generate([row], None, num_generations=1) for row in rows]
    assert together[1] == [one[1][0] for one in alone]
    assert together[1][0] == together[1][2]
    assert together[1][0] != together[1][1]
    trainer.close()


def test_structured_outputs_and_stop_strings(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(checkpoints["llama"], torch.bfloat16)
    regex = make("grpo", engine, model, tmp_path, vllm_structured_outputs_regex="[0-9]{3}")
    regex.vllm_generation.sync_weights()
    _, completions, _, _ = regex.vllm_generation.generate([[10, 20]] * 4, None, 4)
    texts = models.tokenizer().batch_decode(completions, skip_special_tokens=True)
    assert all(len(text) == 3 and text.isdigit() for text in texts), texts
    regex.close()
    stop = make(
        "grpo",
        engine,
        model,
        tmp_path,
        generation_kwargs={"structured_outputs": {"choice": ["abcdef"]}, "stop": ["cd"], "seed": 1},
    )
    stop.vllm_generation.sync_weights()
    _, completions, _, _ = stop.vllm_generation.generate([[10, 20]], None, 1)
    assert models.tokenizer().batch_decode(completions) == ["abcd"]
    stop.close()


class Save(TrainerCallback):
    """Saves a checkpoint after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 2


RESUMABLE = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "generation_kwargs": {"seed": 3}}


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_interrupted(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def run(**values: Any) -> Any:
        model = model_of(checkpoints["llama"], torch.bfloat16)
        return make("grpo", engine, model, tmp_path / "out", callbacks=[Save()], **(RESUMABLE | values))

    whole = run()
    whole.train()
    assert whole.policy_weights.aliased
    whole.close()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    engine.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)

    resumed = run()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 4
    assert_same_bits(engine, resumed.model)
    for (name, parameter), expected in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    # Once more with the same trainer, whose parameters are the engine's memory: loading writes under the
    # lease.
    version = resumed.policy_weights.weight_version
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.policy_weights.aliased
    assert resumed.policy_weights.weight_version >= version + 3, "one for loading, one for each of two steps"
    assert_same_bits(engine, resumed.model)
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    resumed.close()


def test_a_checkpoint_saved_from_engine_memory_is_whole(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(checkpoints["llama"], torch.bfloat16)
    trainer = make("grpo", engine, model, tmp_path)
    trainer.train()
    assert trainer.policy_weights.aliased
    trainer.save_model(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    saved, state = load_file(tmp_path / "saved" / "model.safetensors"), torch.load(tmp_path / "state.pt")
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name], parameter), name
        assert torch.equal(state[name], parameter), name
    trainer.close()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"vllm_mode": "sideways"}, "vllm_mode"),
        ({"vllm_max_model_length": 10_000}, "vllm_max_model_length"),
        ({"generation_kwargs": {"beam_width": 4}}, "generation_kwargs.beam_width"),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
            "vllm_importance_sampling_mode",
        ),
    ],
)
def test_bad_arguments_are_named_before_training(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as raised:
        make("grpo", engine, model_of(checkpoints["llama"], torch.float32), tmp_path, **values)
    assert [violation.field for violation in raised.value.violations] == [field]


def test_no_address(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_INFERENCE_ADDRESS", raising=False)
    with pytest.raises(InvalidArgument, match="TANDEM_INFERENCE_ADDRESS"):
        trainers.GRPOTrainer("nothing", reward, arguments("grpo", tmp_path), prompts())


def test_another_model_than_the_engines(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    trainer = make("grpo", engine, model_of(checkpoints["qwen3"], torch.float32), tmp_path)
    with pytest.raises(InvalidArgument) as raised:
        trainer.train()
    assert raised.value.reason == Reason.MANIFEST_MISMATCH
    assert "tensors[model.layers.0.self_attn.q_norm.weight]" in {v.field for v in raised.value.violations}
    trainer.close()
