"""Every name of TRL's distillation trainers that trainer_service relies on, as test_trl_names has GRPO's and RLOO's."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap

import pytest

from tests.contract.test_trl_names import attributes, parameters
from trainer_service import _trl_experimental as trl
from trainer_service import trainers
from trainer_service._trl import without_vllm
from trainer_service.teacher import Teacher

with without_vllm():
    from trl.generation.vllm_client import VLLMClient

INFERENCE = ("inference_address", "inference_token")
TEACHER = ("teacher_address", "teacher_token")
PAIRS = [
    (trainers.DistillationTrainer, trl.TrlDistillationTrainer, INFERENCE),
    (trainers.GMPOTrainer, trl.TrlGMPOTrainer, INFERENCE),
    (trainers.GOLDTrainer, trl.TrlGOLDTrainer, INFERENCE),
    (trainers.IWOPDTrainer, trl.TrlIWOPDTrainer, (*INFERENCE, *TEACHER)),
    (trainers.SDFTTrainer, trl.TrlSDFTTrainer, INFERENCE),
    (trainers.SDPOTrainer, trl.TrlSDPOTrainer, INFERENCE),
    (trainers.ServerDistillationTrainer, trl.TrlServerDistillationTrainer, (*INFERENCE, *TEACHER)),
]
SELF_TAUGHT = [trl.TrlSDFTTrainer, trl.TrlSDPOTrainer]
MIXING = [trl.TrlGOLDTrainer, trl.TrlIWOPDTrainer]


def source(function: object) -> str:
    return inspect.getsource(inspect.unwrap(function))


@pytest.mark.parametrize(("ours", "theirs", "keywords"), PAIRS)
def test_the_signature_is_trls_and_ours_keywords(ours: type, theirs: type, keywords: tuple[str, ...]) -> None:
    expected = parameters(theirs.__init__)
    rest = {name: expected.pop(name) for name in ("kwargs",) if name in expected}
    expected |= dict.fromkeys(keywords, (inspect.Parameter.KEYWORD_ONLY, None)) | rest
    assert parameters(ours.__init__) == expected
    assert list(parameters(ours.__init__)) == list(expected), "the order counts: arguments may be positional"
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(("ours", "theirs", "keywords"), PAIRS)
def test_nothing_else_is_called_on_the_engine(ours: type, theirs: type, keywords: tuple[str, ...]) -> None:
    used = {
        name
        for function in vars(theirs).values()
        if inspect.isfunction(function) or hasattr(function, "__wrapped__")
        for name in attributes(inspect.unwrap(function))
        if name.startswith(("vllm_generation.", "teacher_client."))
    }
    tools = "vllm_generation.llm.llm_engine.model_config.max_model_len"
    parts = {tools.rsplit(".", n)[0] for n in range(4)} - {"vllm_generation"}
    asked = {"vllm_generation.sync_weights", "vllm_generation.generate"}
    assert used <= asked | parts | {"teacher_client.get_sequence_logprobs"}
    if ours not in (trainers.GMPOTrainer, trainers.ServerDistillationTrainer):  # which inherit it
        assert asked <= used
    assert ("teacher_client.get_sequence_logprobs" in used) == (
        bool(set(TEACHER) & set(keywords)) or theirs in SELF_TAUGHT
    )


def test_teachers_are_asked_as_trls_client_is() -> None:
    theirs, ours = (parameters(cls.get_sequence_logprobs) for cls in (VLLMClient, Teacher))
    assert ours == theirs


@pytest.mark.parametrize("theirs", MIXING)
def test_what_ours_uses_of_the_trainers_that_mix(theirs: type) -> None:
    start = attributes(theirs.__init__)
    assert {"use_vllm", "vllm_sync_frequency", "_last_vllm_sync_step", "_metrics"} <= start
    ours = next(mine for mine, of, _ in PAIRS if of is theirs)
    assert {ours._flags, "use_vllm"} <= attributes(theirs._fill_buffer) | start
    assert f"self.{ours._flags} = on_policy_flags" in source(theirs._fill_buffer)


@pytest.mark.parametrize("theirs", SELF_TAUGHT)
def test_what_ours_uses_of_the_trainers_that_teach_themselves(theirs: type) -> None:
    start = attributes(theirs.__init__)
    assert {"use_vllm", "_last_loaded_step", "use_teacher_server", "teacher_client"} <= start
    assert {"use_vllm", "_generate_vllm"} <= attributes(theirs._generate)
    assert "_record_completion_metrics" in attributes(theirs._prepare_training_batch)  # gathers over ranks
    assert "self.accelerator.gather(" in source(theirs._record_completion_metrics)
    # The checks that ours repeats, since the flag is off while TRL starts.
    text = source(theirs.__init__)
    assert 'if args.teacher_model_kind != "live":' in text
    assert 'if args.distillation_mode not in ("sampled_token", "topk_logits"):' in text
    assert ("if args.distillation_weight != 1.0:" in text) == (theirs is trl.TrlSDPOTrainer)
    scored = theirs._get_teacher_token_logprobs_from_server
    assert (
        'top_logprobs = self.args.distillation_topk if self.args.distillation_mode == "topk_logits" else 1'
        in (source(scored))
    )


def test_server_distillation_sets_what_ours_sets_in_its_place() -> None:
    tree = ast.parse(textwrap.dedent(source(trl.TrlServerDistillationTrainer.__init__)))
    found = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if ast.unparse(target).startswith("self.")
    }
    names = ("reverse_kl_top_1_mode", "loss_top_k", "loss_add_tail", "teacher_client")
    assert found == {f"self.{name}" for name in names}
    assert trl.TrlServerDistillationTrainer.__mro__[1] is trl.TrlDistillationTrainer


def test_iw_opd_wants_the_sampled_tokens_logprobs_for_one_objective() -> None:
    text = source(trl.TrlIWOPDTrainer.__init__)
    assert 'logprobs=0 if args.distillation_objective == "iw_opd" else None' in text
    assert "if self.use_teacher_server:" in text
    config = source(trl.IWOPDConfig.__post_init__)
    assert (
        'self.distillation_objective == "iw_opd" and self.use_vllm and self.vllm_sync_frequency != 1'
        in config
    )
    for theirs in (trl.TrlGOLDTrainer, trl.TrlDistillationTrainer, *SELF_TAUGHT):
        assert "logprobs=None" in source(theirs.__init__)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (trl.DistillationConfig, ("generation_kwargs", "vllm_structured_outputs_regex", "min_p")),
        (trl.GOLDConfig, ("vllm_sync_frequency", "vllm_structured_outputs_regex", "max_length")),
        (
            trl.IWOPDConfig,
            ("vllm_sync_frequency", "use_teacher_server", "teacher_model_server_url", "loss_top_k"),
        ),
        (
            trl.SDFTConfig,
            ("generation_kwargs", "use_teacher_server", "distillation_topk", "distillation_mode"),
        ),
        (
            trl.SDPOConfig,
            ("generation_kwargs", "use_teacher_server", "distillation_topk", "distillation_weight"),
        ),
        (trl.ServerDistillationConfig, ("teacher_model_server_url", "loss_top_k", "temperature")),
    ],
)
def test_what_ours_reads_of_the_configs(config: type, fields: tuple[str, ...]) -> None:
    known = config.__dataclass_fields__
    common = (
        "use_vllm",
        "vllm_mode",
        "vllm_server_timeout",
        "vllm_enable_sleep_mode",
        "max_completion_length",
    )
    for name in (*common, *fields, "temperature", "top_p", "top_k"):
        assert name in known, name


def test_importing_all_trainers_imports_no_vllm_and_warns_of_nothing() -> None:
    script = """
        import sys, warnings
        from trainer_service import trainers
        assert "trl" not in sys.modules, "trainers are imported when they are asked for"
        from trainer_service.trainers import GRPOTrainer
        assert "trainer_service._trl_experimental" not in sys.modules
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in trainers.__all__:
                getattr(trainers, name)
        assert not [w for w in caught if "Experimental" in w.category.__name__]
        assert set(trainers.__all__) == set(trainers._MODULES)
        loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "vllm")
        assert not loaded, loaded[:5]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="PPOTrainer"):
        _ = trainers.PPOTrainer
