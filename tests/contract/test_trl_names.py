"""Every name of TRL, transformers and torch that trainer_service relies on: renamed ones fail here."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import textwrap

import pytest
from torch.optim import optimizer
from transformers import Trainer, TrainingArguments

from trainer_service import _trl
from trainer_service.generation import RemoteGeneration
from trainer_service.trainers import GRPOTrainer, RLOOTrainer
from trainer_service.trainers.optimizer import ADAMW

PAIRS = [(GRPOTrainer, _trl.TrlGRPOTrainer), (RLOOTrainer, _trl.TrlRLOOTrainer)]


def parameters(function: object) -> dict[str, tuple[object, object]]:
    return {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}


def attributes(function: object, owner: str = "self") -> set[str]:
    """The attributes of `owner` that the source of a function names, dotted ones whole."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        ast.unparse(node).removeprefix(f"{owner}.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(f"{owner}.")
    }


def test_version() -> None:
    assert importlib.metadata.version("trl").startswith("1.16.")


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_signature_is_trls_and_three_keywords(ours: type, theirs: type) -> None:
    expected = parameters(theirs.__init__)
    keyword = (inspect.Parameter.KEYWORD_ONLY, None)
    expected |= {"inference_address": keyword, "inference_token": keyword}
    expected |= {"lora_mode": (inspect.Parameter.KEYWORD_ONLY, "merged")}
    assert parameters(ours.__init__) == expected
    assert list(parameters(ours.__init__)) == list(expected), "the order counts: arguments may be positional"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_trl_trainers_call_on_their_engine(ours: type, theirs: type) -> None:
    used = {
        name.removeprefix("vllm_generation.")
        for function in vars(theirs).values()
        if inspect.isfunction(function) or hasattr(function, "__wrapped__")
        for name in attributes(inspect.unwrap(function))
        if name.startswith("vllm_generation.")
    }
    known = {
        "sync_weights",
        "generate",
        "llm",
        "llm.llm_engine",
        "llm.llm_engine.model_config",
        "llm.llm_engine.model_config.max_model_len",
        "vllm_client",
        "vllm_client.get_server_info",
    }
    assert used <= known
    assert {"sync_weights", "generate"} <= used


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_what_ours_uses_of_trl_trainers(ours: type, theirs: type) -> None:
    start = attributes(theirs.__init__)
    for name in (
        "use_vllm",
        "vllm_mode",
        "vllm_generation",
        "_last_loaded_step",
        "use_transformers_continuous_batching",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_completion_length",
        "_metrics",
        "accelerator",
    ):
        assert name in start, name
    turn = attributes(theirs._generate_single_turn)
    for name in ("use_vllm", "_last_loaded_step", "state.global_step", "vllm_generation.generate"):
        assert name in turn, name
    score = attributes(theirs._generate_and_score_completions)
    assert {"_generate", "_calculate_rewards"} <= score  # of which the second gathers over ranks
    assert "= gather(rewards_per_func)" in inspect.getsource(theirs._calculate_rewards)
    assert parameters(theirs.log)["logs"][0] == inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in ("train", "_load_from_checkpoint", "_load_best_model", "log"):
        assert inspect.isfunction(getattr(Trainer, name)), name


@pytest.mark.parametrize("config", [_trl.GRPOConfig, _trl.RLOOConfig])
def test_what_ours_reads_of_the_configs(config: type) -> None:
    fields = config.__dataclass_fields__
    for name in (
        "use_vllm",
        "generation_kwargs",
        "use_transformers_continuous_batching",
        "vllm_structured_outputs_regex",
        "vllm_max_model_length",
        "vllm_enable_sleep_mode",
    ):
        assert name in fields, name
    assert fields["vllm_mode"].default == "colocate"
    assert fields["vllm_server_timeout"].default == 240.0
    if config is _trl.GRPOConfig:
        for name in ("loss_type", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"):
            assert name in fields, name


def test_vllm_generation_is_what_ours_overrides() -> None:
    theirs = _trl.VLLMGeneration
    for name in ("_init_vllm", "sync_weights", "generate"):
        assert parameters(getattr(RemoteGeneration, name)) == parameters(getattr(theirs, name)), name
    start = parameters(theirs.__init__)
    for name in (
        "model",
        "accelerator",
        "processing_class",
        "mode",
        "structured_outputs_regex",
        "server_timeout",
        "max_model_length",
        "enable_sleep_mode",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_completion_length",
        "logprobs",
        "generation_kwargs",
    ):
        assert name in start, name
        assert name in attributes(theirs.__init__), f"{name} is not stored"
    # Its __init__ only stores, and calls what we override.
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(theirs.__init__))))
        if isinstance(node, ast.Call)
    ]
    assert set(calls) == {"DistributedBackend", "self._init_vllm"}


def test_grpo_wants_the_sampled_tokens_logprob_first_and_rloo_none() -> None:
    assert "lp[0] for lp in seq" in inspect.getsource(_trl.TrlGRPOTrainer._generate_single_turn)
    assert "logprobs=0," in inspect.getsource(_trl.TrlGRPOTrainer.__init__)
    assert "logprobs=None," in inspect.getsource(_trl.TrlRLOOTrainer.__init__)
    assert (GRPOTrainer._logprobs, RLOOTrainer._logprobs) == (0, None)


def test_the_vespo_check_that_the_flip_skips_is_still_trls_own() -> None:
    source = inspect.getsource(_trl.TrlGRPOTrainer.__init__)
    assert (
        'self.loss_type == "vespo" and self.use_vllm and self.vllm_importance_sampling_correction' in source
    )
    assert '["token_truncate", "token_mask"]' in source


def test_vllm_mode_matters_to_trl_in_the_tool_loop_and_where_it_starts_an_engine() -> None:
    for theirs in (_trl.TrlGRPOTrainer, _trl.TrlRLOOTrainer):
        readers = {
            name
            for name, function in vars(theirs).items()
            if inspect.isfunction(function) and "self.vllm_mode" in inspect.getsource(function)
        }
        assert readers <= {"__init__", "_tool_call_loop"}
    assert 'self.vllm_mode == "colocate"' in inspect.getsource(_trl.TrlGRPOTrainer._tool_call_loop)


def test_optimizer_hooks() -> None:
    assert callable(optimizer.register_optimizer_step_pre_hook)
    assert callable(optimizer.register_optimizer_step_post_hook)


def test_transformers_makes_the_optimizer_that_it_is_told_to() -> None:
    assert TrainingArguments("out", use_cpu=True).optim in ADAMW
    source = inspect.getsource(Trainer.create_optimizer)
    assert "optimizer_cls, optimizer_kwargs = self.optimizer_cls_and_kwargs" in source


def test_importing_the_trainers_imports_no_vllm() -> None:
    script = """
        import sys
        from trainer_service.trainers import GRPOTrainer, RLOOTrainer
        from trl import GRPOConfig
        loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "vllm")
        assert not loaded, loaded[:5]
        from trl.import_utils import is_vllm_available
        print(is_vllm_available())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The question is answered truthfully again, and vLLM is there to be found: else this test proves nothing.
    assert done.stdout.strip() == "True"
