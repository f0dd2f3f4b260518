"""TRL's other trainers on the seam, over real engines: the policy's, and a teacher's where the trainer asks one.

Each run is done a second time by TRL's own class, which takes what the engine sampled for its own, and has to come to
the same losses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tandem.errors import FailedPrecondition, InvalidArgument
from tandem.weights.v1 import weights_pb2 as pb
from tests import models
from tests.integration.distillation import KINDS, Oracle, Recorded, counted, lengths
from tests.services import Service, inference_service
from tests.trainers import assert_same_bits, logged, model_of
from trainer_service import trainers
from trainer_service.client import InferenceClient
from trainer_service.teacher import Teacher

# TRL, transformers and accelerate warn of themselves; ours are errors still.
pytestmark = pytest.mark.filterwarnings("default:::(trl|transformers|accelerate|peft|torch|datasets)")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's checkpoint: as the policy's, with other weights."""
    return models.make(tmp_path_factory.mktemp("teacher"), "llama", seed=7, dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher(teachers: Path) -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="tdm") as folder,
        inference_service(teachers, Path(folder), dtype="float32", max_logprobs="-1") as service,
    ):
        yield service


@pytest.fixture
def policy(exact: Service) -> Iterator[Service]:
    exact.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    yield exact
    exact.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_trls_over_the_engines_rollouts(
    policy: Service,
    teacher: Service,
    teachers: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    kind = KINDS[name]
    mode = "server" if name == "gold" else "colocate"
    model = model_of(checkpoints["llama"], torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    own: dict[str, Any] = {"inference_address": policy.address}
    if kind.teacher == "served":
        own["teacher_address"] = teacher.address
    args = kind.args(tmp_path / "a", vllm_mode=mode)
    cls = getattr(trainers, kind.ours)
    ours = kind.make(cls, model, args, teachers if kind.teacher == "local" else None, **own)
    recorded = Recorded(ours)
    scoring = kind.teacher == "served" or "use_teacher_server" in kind.values
    scored = counted(ours.teacher_client, "get_sequence_logprobs") if scoring else []
    ours.train()
    assert bool(scored) == scoring
    assert ours.vllm_generation.calls == kind.calls
    assert tuple(recorded.syncs) == kind.syncs
    if mode == "server":
        ours.vllm_generation.sync_weights()  # the last step's: nothing was generated from it
    else:
        assert ours.policy_weights.aliased
    assert_same_bits(policy, model)
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    losses = logged(ours, "loss")
    assert len(losses) == args.max_steps
    assert any(abs(loss) > 1e-4 for loss in losses)
    assert all(value > 0 for value in logged(ours, "tandem/tokens_per_second"))
    ours.close()

    own_model = model_of(checkpoints["llama"], torch.float32)
    recorded.replay(own_model)
    # A model for a teacher, where ours asked a service.
    local = {"use_teacher_server": False} if "use_teacher_server" in kind.values else {}
    theirs = kind.make(
        kind.theirs, own_model, kind.args(tmp_path / "b", **local), teachers if kind.teacher else None
    )
    if name.startswith("iw_opd"):
        theirs._get_completion_lengths = lengths(recorded.rows)
    theirs.train()
    assert recorded.left == []
    expected = logged(theirs, "loss")
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_teachers_scores_are_its_models(teacher: Service, teachers: Path, temperature: float) -> None:
    sequences = [[5, 17, 99, 200, 44, 7], [9, 9], [3, 250, 1, 60], [100, 4, 4, 4, 4, 4, 4, 90, 91]]
    prompt_lengths = [2, 1, 4, 5]  # of the third nothing is asked
    ours = Teacher(InferenceClient(teacher.address))
    expected = Oracle(model_of(teachers, torch.float32)).get_sequence_logprobs(
        sequences, prompt_lengths, top_logprobs=5, temperature=temperature
    )
    found = ours.get_sequence_logprobs(sequences, prompt_lengths, top_logprobs=5, temperature=temperature)
    assert found.keys() == expected.keys()
    for name in ("logprob_token_ids", "actual_token_ids"):
        assert found[name] == expected[name]
    for name in ("logprobs", "actual_logprobs"):
        for mine, row in zip(found[name], expected[name], strict=True):
            assert torch.tensor(mine).shape == torch.tensor(row).shape
            assert torch.allclose(torch.tensor(mine), torch.tensor(row), atol=2e-4)
    assert found["actual_logprobs"][2] == []
    with pytest.raises(InvalidArgument, match="prompt_lengths"):
        ours.get_sequence_logprobs([[5, 6]], [0])
    ours.close()


def test_a_teacher_with_another_vocabulary_is_refused(teacher: Service) -> None:
    ours, tokenizer = Teacher(InferenceClient(teacher.address)), models.tokenizer()
    ours.check_vocabulary(tokenizer, 100)
    found = ours.get_sequence_logprobs([[5, 17, 99]], [1], top_logprobs=259)
    for ids, values in zip(found["logprob_token_ids"][0], found["logprobs"][0], strict=True):
        assert max(ids) < 100, "the student has no such token"
        assert values.count(float("-inf")) == 159
    tokenizer.add_tokens(["more", "words"])
    with pytest.raises(InvalidArgument, match="261"):
        ours.check_vocabulary(tokenizer, 261)
    other = models.tokenizer()
    vocabulary = other.get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other.backend_tokenizer.model = type(other.backend_tokenizer.model)(vocab=vocabulary, merges=[])
    with pytest.raises(InvalidArgument) as raised:
        ours.check_vocabulary(other, 259)
    assert [violation.field for violation in raised.value.violations] == ["teacher_address"]
    ours.close()


@pytest.mark.parametrize(
    ("name", "values", "own", "field"),
    [
        ("server_distillation", {"loss_top_k": 50, "beta": 0, "temperature": 1.0}, "llama", "loss_top_k"),
        ("server_distillation", {}, "llama", "temperature"),
        ("server_distillation", {}, "exact", "teacher_address"),
        ("server_distillation", {}, "", "teacher_address"),
        ("iw_opd", {}, "llama", "teacher_address"),
        ("iw_opd_served", {"vllm_sync_frequency": 2}, "llama", "vllm_sync_frequency"),
        ("gold", {"max_length": 1024}, "", "max_length"),
        ("sdft_served", {"teacher_model_kind": "base"}, "", "teacher_model_kind"),
        ("sdft_served", {"distillation_mode": "full_logits"}, "", "distillation_mode"),
        (
            "sdft_served",
            {"distillation_mode": "topk_logits", "distillation_topk": 300},
            "",
            "distillation_topk",
        ),
        ("sdft_served", {"vllm_enable_sleep_mode": True}, "", "vllm_enable_sleep_mode"),
        ("sdpo_served", {"distillation_weight": 0.5}, "", "distillation_weight"),
        ("sdpo", {"vllm_mode": "sideways"}, "", "vllm_mode"),
    ],
)
def test_what_cannot_be_had_is_named_before_training(
    exact: Service,
    llama: Service,
    teachers: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    name: str,
    values: dict[str, Any],
    own: str,
    field: str,
) -> None:
    kind = KINDS[name]
    address = {"llama": llama, "exact": exact}[own].address if own else None
    with pytest.raises(InvalidArgument) as raised:
        kind.make(
            getattr(trainers, kind.ours),
            model_of(checkpoints["llama"], torch.float32),
            kind.args(tmp_path, **values),
            teachers if kind.teacher == "local" else None,
            inference_address=exact.address,
            **({"teacher_address": address} if address else {}),
        )
    assert [violation.field for violation in raised.value.violations] == [field]


@pytest.mark.parametrize("name", ["distillation", "gold", "iw_opd", "sdpo"])
def test_trl_must_not_generate_by_itself(
    policy: Service, teachers: Path, checkpoints: dict[str, Path], tmp_path: Path, name: str
) -> None:
    kind = KINDS[name]
    trainer = kind.make(
        getattr(trainers, kind.ours),
        model_of(checkpoints["llama"], torch.float32),
        kind.args(tmp_path),
        teachers if kind.teacher == "local" else None,
        inference_address=policy.address,
    )
    trainer.use_vllm = False
    with pytest.raises(RuntimeError, match="generated by itself"):
        trainer.train()
    trainer.close()


def test_an_adapter_that_teaches_is_not_the_policy(
    policy: Service, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """SDPO's teacher is a second adapter of the same model: what is merged for the engine is the first."""
    kind = KINDS["sdpo"]
    trainer = kind.make(
        trainers.SDPOTrainer,
        model_of(checkpoints["llama"], torch.float32),
        kind.args(tmp_path, learning_rate=0.05, max_steps=2),
        None,
        inference_address=policy.address,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert set(trainer.model.peft_config) == {"default", "teacher"}
    trainer.vllm_generation.sync_weights()
    assert_same_bits(policy, trainer.model)
    sequence = [5, 17, 99, 200, 44, 7, 120]
    (score,) = trainer.vllm_generation.client.score([sequence])
    with torch.no_grad():
        logits = trainer.model(torch.tensor([sequence])).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(list(score.logprobs)), expected, atol=1e-3)
    trainer.close()


def test_a_live_teacher_has_the_weights_that_were_synced(
    policy: Service, checkpoints: dict[str, Path]
) -> None:
    """Scores of another version than the trainer's are none."""
    client = InferenceClient(policy.address)
    held = client.get_model().weight_version
    recovered: list[Any] = []
    live = Teacher(client, recover=recovered.append, version=lambda: held)
    assert live.get_sequence_logprobs([[5, 17, 99]], [1], top_logprobs=1)["actual_token_ids"] == [
        [[17], [99]]
    ]
    policy.weights.RestoreCheckpoint(pb.RestoreCheckpointRequest(), timeout=30)
    with pytest.raises(FailedPrecondition, match="weight versions"):
        live.get_sequence_logprobs([[5, 17, 99]], [1], top_logprobs=1)
    assert len(recovered) == 2, "the trainer's syncs, between three tries"
    live.close()


def test_rollouts_after_a_checkpoint_are_the_checkpoints(
    policy: Service, teachers: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Also where the step is none that `vllm_sync_frequency` divides, for which TRL would wait."""
    kind = KINDS["iw_opd"]
    trainer = kind.make(
        trainers.IWOPDTrainer,
        model_of(checkpoints["llama"], torch.float32),
        kind.args(tmp_path, vllm_sync_frequency=2),
        teachers,
        inference_address=policy.address,
    )
    recorded = Recorded(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.state.global_step = 3
    trainer._fill_buffer(batch, 2)
    trainer._fill_buffer(batch, 2)
    assert recorded.syncs == [3]
    with trainer.updating_weights(), torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    trainer._fill_buffer(batch, 2)
    assert recorded.syncs == [3, 3]
    assert_same_bits(policy, trainer.model)
    trainer.close()
