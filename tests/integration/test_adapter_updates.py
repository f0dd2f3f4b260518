"""LoRA adapters that a trainer gives the engine alone, beside weights that stay what they are. In float32, against
PEFT's own forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from tandem.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Reason
from tandem.inference.v1 import inference_pb2
from tandem.weights.v1 import weights_pb2 as pb
from tests.integration.calls import (
    LONG,
    Reading,
    generate,
    idle,
    ids,
    joined,
    one,
    pause,
    refused,
    request,
    resume,
    score,
    spans,
    stats,
    until,
)
from tests.integration.test_adapters import load, unload
from tests.services import Service, inference_service
from tests.trainers import logged, make, model_of
from trainer_service.client import InferenceClient
from trainer_service.weights import PolicyWeights

pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")

PROMPTS = [[5], [40, 41, 42, 43], list(range(3, 203))]
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def adapted(checkpoint: Path, seed: int = 0, **config: Any) -> Any:
    """The tiny Llama under an adapter that changes it a lot."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(model_of(checkpoint, torch.float32), LoraConfig(**config))
    scramble(model, seed)
    return model.eval()


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.1)


@torch.no_grad()
def logprobs(model: torch.nn.Module, sequence: list[int], start: int = 1) -> list[float]:
    """Of a sequence's tokens, from one on."""
    found = model(torch.tensor([sequence])).logits[0, start - 1 : -1].log_softmax(-1)
    return found.gather(-1, torch.tensor(sequence[start:])[:, None])[:, 0].tolist()


def check(service: Service, model: Any, lora: str = "policy") -> None:
    """Rollouts and scores with the adapter are the model's, and those without it the base's."""
    sampling = {"seed": 1, "ignore_eos": True, "max_tokens": 12}
    for name in (lora, ""):
        rollouts = generate(service, *map(ids, PROMPTS), sampling=sampling, lora=name)
        for index, prompt in enumerate(PROMPTS):
            sequence = [*prompt, *rollouts[index, 0].token_ids]
            with ExitStack() as base:
                if not name:
                    base.enter_context(model.disable_adapter())
                wanted = logprobs(model, sequence)
            assert list(rollouts[index, 0].logprobs) == pytest.approx(wanted[len(prompt) - 1 :], abs=1e-4)
            (found,) = score(service, sequence, lora=name)
            assert list(found.logprobs) == pytest.approx(wanted, abs=1e-4)


def digest(service: Service, adapter: str = "") -> int:
    asked = pb.GetWeightVersionRequest(include_digest=True, adapter=adapter)
    return service.weights.GetWeightVersion(asked, timeout=30).digest


def version(service: Service) -> int:
    return service.weights.GetWeightVersion(pb.GetWeightVersionRequest(), timeout=5).weight_version


@pytest.fixture
def engine(exact: Service) -> Iterator[Service]:
    """The service with the checkpoint's weights."""
    exact.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    yield exact
    for name in stats(exact).loras:
        unload(exact, name)
    idle(exact)


@pytest.fixture
def weights_of(engine: Service) -> Iterator[Callable[..., PolicyWeights]]:
    """Makes what gives the engine a model's adapter."""
    with ExitStack() as made:

        def make_one(model: Any, service: Service = engine, adapter: str = "policy") -> PolicyWeights:
            client = InferenceClient(service.address)
            weights = PolicyWeights(client, lambda: model, transport="stream", timeout_s=30, adapter=adapter)
            made.callback(client.close)
            made.callback(weights.detach)
            return weights

        yield make_one


def adapter_bytes(model: Any) -> int:
    return sum(p.numel() * 4 for name, p in model.named_parameters() if "lora_" in name)


def test_a_run_gives_the_engine_its_adapter_alone(
    engine: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    before, first = digest(engine), version(engine)
    trainer = make(
        "grpo",
        engine,
        model_of(checkpoints["llama"], torch.float32),
        tmp_path,
        max_steps=3,
        learning_rate=0.05,
        peft_config=LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
        lora_mode="adapter",
    )
    trainer.train()
    trainer.vllm_generation.sync_weights()
    history = trainer.policy_weights.history
    assert [update.weight_version for update in history] == list(range(first + 1, first + 5))
    assert {update.nbytes for update in history} == {adapter_bytes(trainer.model)}
    assert sum(p.numel() * 4 for p in trainer.model.parameters()) > 8 * adapter_bytes(trainer.model)
    assert logged(trainer, "tandem/bytes_moved") == [adapter_bytes(trainer.model)] * 3
    assert digest(engine) == before, "the engine's weights were written"
    apart = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert len(apart) == 3
    assert all(value < 1e-4 for value in apart)
    model = trainer.model.eval()
    check(engine, model)
    sequence = list(range(20, 60))
    changed = torch.tensor(logprobs(model, sequence))
    with model.disable_adapter():
        changed -= torch.tensor(logprobs(model, sequence))
    assert changed.abs().max() > 0.1, "training changed nothing: no test"
    trainer.close()


def test_alone_and_merged_are_the_same_policy(
    engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights]
) -> None:
    model = adapted(checkpoints["llama"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    alone, merged = weights_of(model), weights_of(model, adapter="")
    alone.sync()
    sequence = list(range(30, 130))
    (first,) = score(engine, sequence, lora="policy")
    merged.sync()
    (second,) = score(engine, sequence)
    assert list(first.logprobs) == pytest.approx(list(second.logprobs), abs=1e-4)
    assert list(first.logprobs) == pytest.approx(logprobs(model, sequence), abs=1e-4)
    assert alone.bytes_moved < merged.bytes_moved / 8
    # The engine's weights are others now: an adapter on top would be of no policy.
    alone_again = weights_of(model)
    for stale in (alone, alone_again):
        with pytest.raises((FailedPrecondition, InvalidArgument)) as raised:
            stale.sync()
    assert raised.value.reason == Reason.MANIFEST_MISMATCH


def test_rollouts_under_way_go_on_with_the_new_adapter(
    engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights]
) -> None:
    model = adapted(checkpoints["llama"])
    weights = weights_of(model)
    weights.sync()
    asked = request(
        ids([5, 6, 7], 8),
        sampling=LONG | {"seed": 3},
        lora="policy",
        output_mode=inference_pb2.OUTPUT_MODE_DELTAS,
    )
    for i in range(5):  # on a busy machine the rollouts may end before we can stop them
        reading = Reading(engine, asked)
        until(lambda reading=reading: reading.pieces, 20, "rollouts are under way")
        pause(engine)
        old = copy.deepcopy(model)
        scramble(model, seed=7 + i)
        weights.sync()
        resume(engine)
        rollouts = joined(reading.end())
        assert reading.error is None
        versions = [weights.weight_version - 1, weights.weight_version]
        for rollout in rollouts.values():
            sequence, place = [5, 6, 7, *rollout.token_ids], 0
            for number, count in spans(rollout):
                assert number in versions
                wanted = logprobs(old if number == versions[0] else model, sequence, 3)[place : place + count]
                assert list(rollout.logprobs[place : place + count]) == pytest.approx(wanted, abs=1e-4)
                place += count
        check(engine, model)  # and no prefix that the old one cached
        if any([v for v, _ in spans(rollout)] == versions for rollout in rollouts.values()):
            return
    pytest.fail("the rollouts were never stopped in the middle")


def test_others_may_take_its_place_in_the_engine_for_a_while(
    engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights], tmp_path: Path
) -> None:
    model, other = adapted(checkpoints["llama"]), adapted(checkpoints["llama"], seed=5)
    other.save_pretrained(tmp_path / "other")
    weights = weights_of(model)
    weights.sync()
    load(engine, "other", tmp_path / "other")  # the engine has room for one
    assert list(stats(engine).loras) == ["other", "policy"]
    check(engine, model)
    check(engine, other, "other")
    scramble(model, seed=9)
    weights.sync()
    check(engine, other, "other")
    check(engine, model)
    error = refused(lambda: load(engine, "policy", tmp_path / "other"))
    assert [violation.field for violation in error.violations] == ["name"]
    unload(engine, "policy")
    assert isinstance(refused(lambda: one(engine, ids([5]), lora="policy")), NotFound)
    weights.sync()
    check(engine, model)


def test_a_failed_update_leaves_the_old_adapter(
    engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights]
) -> None:
    model = adapted(checkpoints["llama"])
    weights = weights_of(model)
    weights.sync()
    held = digest(engine, "policy")
    session = weights._session
    assert session is not None
    lease = session.begin(session.weight_version + 1)
    session.transport.move(weights._policy([]), lease.send)
    with pytest.raises(DataLoss, match="DIGEST_MISMATCH"):
        lease.commit(1)
    lease = session.begin(session.weight_version + 1)
    with pytest.raises(FailedPrecondition, match=r"layers\.0.*lora_A\.weight: 0 of"):
        lease.commit(1)
    lease = session.begin(session.weight_version + 1)
    lease.abort("on second thoughts", untouched=False)
    assert (version(engine), digest(engine, "policy")) == (weights.weight_version, held)
    assert engine.health() == "SERVING"
    check(engine, model)
    scramble(model, seed=4)
    weights.sync()
    assert digest(engine, "policy") != held
    check(engine, model)


def test_what_the_engine_cannot_use_is_named(
    engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights]
) -> None:
    before = version(engine)
    llama = checkpoints["llama"]

    def told(model: Any, **options: Any) -> Any:
        with pytest.raises((InvalidArgument, FailedPrecondition)) as raised:
            weights_of(model, **options).sync()
        return raised.value

    error = told(adapted(llama, r=16))
    assert error.reason == Reason.MANIFEST_MISMATCH
    assert len(error.violations) == 2 * len(TARGETS)
    assert "rank 16; the engine's max_lora_rank is 8" in str(error)
    error = told(adapted(llama, target_modules=["q_proj", "lm_head"]))
    assert {v.field for v in error.violations} == {
        f"adapter.tensors[lm_head.lora_{part}.weight]" for part in "AB"
    }
    elsewhere = adapted(llama)
    with torch.no_grad():
        elsewhere.get_base_model().model.norm.weight[0] += 1
    error = told(elsewhere)
    assert [violation.field for violation in error.violations] == ["adapter.base_digest"]
    error = told(adapted(checkpoints["qwen3"]))
    assert "tensors[model.layers.0.self_attn.q_norm.weight]" in {v.field for v in error.violations}
    assert version(engine) == before
    assert not stats(engine).loras


def test_an_engine_without_lora(
    llama: Service, engine: Service, checkpoints: dict[str, Path], weights_of: Callable[..., PolicyWeights]
) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        weights_of(adapted(checkpoints["llama"]), llama).sync()
    assert raised.value.reason == Reason.LORA_OFF


@pytest.mark.slow
def test_a_run_goes_on_after_kill_9_of_the_service(
    checkpoints: dict[str, Path], socket_folder: Path, tmp_path: Path
) -> None:
    options = {"dtype": "float32", "enable_lora": "true", "max_lora_rank": "8"}
    with ExitStack() as lives:

        def start(wait: bool) -> Service:
            return lives.enter_context(
                inference_service(checkpoints["llama"], socket_folder, wait=wait, **options)
            )

        services = [start(wait=True)]

        class Kill(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 1:
                    services[0].process.kill()
                    services[0].process.wait()
                    services.append(start(wait=False))  # as a supervisor does

        trainer = make(
            "grpo",
            services[0],
            model_of(checkpoints["llama"], torch.float32),
            tmp_path,
            max_steps=2,
            learning_rate=0.05,
            callbacks=[Kill()],
            vllm_server_timeout=240,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            lora_mode="adapter",
        )
        trainer.train()
        trainer.vllm_generation.sync_weights()
        assert [update.weight_version for update in trainer.policy_weights.history] == [2, 3, 4]
        check(services[1], trainer.model.eval())
        trainer.close()
