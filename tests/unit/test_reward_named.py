"""Rewards by name, and what a trainer is given."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.rewards
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.import_utils import is_math_verify_available

from tandem.errors import InvalidArgument, Unavailable
from tests import rewards
from trainer_service import _trl
from trainer_service.rewards import RemoteReward, builtin, prepared, reward
from trainer_service.rewards.checks import EXTRAS, PASSED
from trainer_service.rewards.named import _builtins

SMALL = dict(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=1
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, by its name."""
    name = "rewards_of_a_user"
    text = """
        constant = 3

        def mine(completions, **_):
            return [1.0] * len(completions)

        class Of:
            @staticmethod
            def theirs(completions, **_):
                return [2.0] * len(completions)

        def make(value, name="made"):
            def made(completions, **_):
                return [value] * len(completions)
            made.__name__ = name
            return made

        def makes_nothing():
            return None
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no key in the environment')")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_trls_own() -> None:
    assert reward("think_format_reward") is trl.rewards.think_format_reward
    penalty = reward("get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5)")
    assert penalty(completion_ids=[[5, 5, 5, 5, 5]]) == [-0.375]
    assert builtin("get_soft_overlong_punishment", {"max_completion_len": 4, "soft_punish_cache": 2})(
        completion_ids=[[1] * 2, [1] * 3, [1] * 5]
    ) == [0.0, -0.5, -1.0]


def test_every_one_of_trls_is_known() -> None:
    """A new or renamed one fails here."""
    names = {name for names in trl.rewards._import_structure.values() for name in names}
    assert len(names) >= 6
    assert set(_builtins()) == names


def test_one_that_needs_what_is_missing_is_told_of_now() -> None:
    assert not is_math_verify_available(), "this test is for where it is missing"
    for make in (
        lambda: reward("accuracy_reward"),
        lambda: reward("get_cosine_scaled_reward(max_len=3)"),
        lambda: prepared([trl.rewards.accuracy_reward]),
    ):
        with pytest.raises(InvalidArgument, match="needs math-verify"):
            make()


def test_a_function_of_a_module(module: str) -> None:
    assert reward(f"{module}:mine")(completions=["a"]) == [1.0]
    assert reward(f"{module}:Of.theirs")(completions=["a"]) == [2.0]
    made = reward(f"{module}:make(value=-1.5, name='x')")
    assert (made(completions=["a"]), made.__name__) == ([-1.5], "x")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("no_such_module:f", "cannot import no_such_module: ModuleNotFoundError"),
        ("broken_rewards:f", "cannot import broken_rewards: RuntimeError: no key in the environment"),
        ("rewards_of_a_user:mime", "has no mime; did you mean mine?"),
        ("rewards_of_a_user:constant", "is no function, but int"),
        ("rewards_of_a_user:make", "does not take prompts"),
        ("rewards_of_a_user:make()", "missing 1 required positional argument: 'value'"),
        ("rewards_of_a_user:make(3)", "only name=value"),
        ("rewards_of_a_user:make(value=print())", "cannot read the arguments"),
        ("rewards_of_a_user:make(**{'value': 1})", "only name=value"),
        ("rewards_of_a_user:make(value=", "is no name of a reward"),
        ("rewards_of_a_user:makes_nothing()", "makes no function, but NoneType"),
        ("think_fromat_reward", "TRL has no reward 'think_fromat_reward': did you mean think_format_reward"),
        ("think_format_reward(x=1)", "takes no arguments"),
        ("get_repetition_penalty_reward(max_penalty=1)", "should not be positive"),
        ("get_repetition_penalty_reward(size=1)", "unexpected keyword argument"),
        ("gpt2", "a model of the Hugging Face hub is written owner/name"),
        ("localhost:7000", "is no name of a reward"),
        ("grpc://localhost", "has no port"),
        ("unix:math.sock", "write unix:///absolute/path"),
        ("./no/such/folder", "there is no folder ./no/such/folder"),
        ("", "is no name of a reward"),
        (3, "is no function, but int"),
        ([], "is no function, but list"),
    ],
)
def test_what_is_no_reward_is_told_with_its_place(module: str, spec: Any, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        prepared([rewards.length, spec])
    assert why in str(caught.value)
    assert [v.field for v in caught.value.violations] == ["reward_funcs[1]"]


def test_a_model_stays_what_trl_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "reward").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL))
    assert prepared([str(tmp_path), "models/reward", "~/models", "owner/reward-model", model]) == [
        str(tmp_path),
        "models/reward",
        str(tmp_path / "models"),
        "owner/reward-model",
        model,
    ]


def test_an_address_is_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_REWARD_TOKEN", "secret")
    monkeypatch.setenv("TANDEM_REWARD_CA_FILE", "/ca.pem")
    unix, host = prepared(["unix:///run/math.sock", "grpc://rewards.example:7000"], reach=False)
    assert isinstance(unix, RemoteReward)
    assert (unix.address, unix._token, unix._arguments) == ("unix:///run/math.sock", "secret", {})
    assert (host.address, host._token) == ("rewards.example:7000", "secret")
    assert host._arguments == {"ca_file": "/ca.pem"}


def test_a_service_that_is_down_is_told_before_anything_is_generated(socket_folder: Path) -> None:
    down = RemoteReward(f"unix://{socket_folder}/math.sock", timeout_s=0.3)
    with pytest.raises(Unavailable, match="the reward service math at"):
        prepared(down)
    assert prepared(down, reach=False) == [down]


def test_what_a_trainer_is_given() -> None:
    given = [rewards.length, rewards.awaited, "think_format_reward"]
    found = prepared(given)
    assert found is not given, "TRL writes into its list"
    assert [function.__name__ for function in found] == ["length", "awaited", "think_format_reward"]
    assert found[0](prompts=["p"], completions=["ab"], completion_ids=[[1]]) == [2.0]
    assert asyncio.run(found[1](prompts=["p"], completions=["ab"], completion_ids=[[1]])) == [2.0]
    assert prepared(rewards.length)[0].__name__ == "length"
    assert prepared(None) == []
    with pytest.raises(InvalidArgument, match=r"reward_funcs\[1\]: awaited is async"):
        prepared(given, awaits=False)
    assert len(prepared([rewards.length], awaits=False)) == 1
    with pytest.raises(
        InvalidArgument, match=r"reward_funcs\[0\]: seen needs times, and the dataset has only prompt"
    ):
        prepared([rewards.seen], columns=["prompt"])
    assert len(prepared([rewards.seen], columns=["prompt", "times"])) == 1


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One that runs in a thread, as TRL's does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("theirs", [_trl.TrlGRPOTrainer, _trl.TrlRLOOTrainer])
def test_trls_own_code_takes_them(theirs: Any, loop: asyncio.AbstractEventLoop) -> None:
    """What TRL does with reward functions, on what they are here."""
    given: set[str] = set()

    def spy(**arguments: Any) -> list[float | None]:
        given.update(arguments)
        return [None, 1.0]

    functions = prepared([rewards.length, rewards.awaited, spy])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        async_loop=loop,
        reward_funcs=functions,
        reward_func_names=[function.__name__ for function in functions],
        reward_processing_classes=[None] * 3,
        _log_completion_extra=None,
        _log_metric=None,
        _metrics={"train": {}},
    )
    found = theirs._calculate_rewards(
        trainer, [{"prompt": "p", "answer": 4}] * 2, ["p"] * 2, ["a", "bcd"], [[1], [2]]
    )
    assert set(PASSED) <= given
    assert given <= EXTRAS | {"answer"}, "a name that is no column's"
    assert torch.equal(found.nan_to_num(-1), torch.tensor([[1.0, 1.0, -1.0], [3.0, 3.0, 1.0]]))


def test_a_name_loads_neither_vllm_nor_torch() -> None:
    script = """
        import sys
        from trainer_service.rewards import reward
        reward("think_format_reward")
        print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "vllm", "transformers", "trl"}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["trl"]
