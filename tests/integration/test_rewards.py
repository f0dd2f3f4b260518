"""Reward services as users run them: by the command, and in a language of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.errors import Internal, InvalidArgument, Reason, Unauthenticated
from tests import rewards
from tests.rewards import ROOT, Served
from tests.services import Service
from trainer_service.client import InferenceClient
from trainer_service.rewards import EngineJudge, JudgeReward, RemoteReward, prepared

CLIENTS = ROOT / "clients"
NODE = shutil.which("node")


def remote(service: Served, **values: Any) -> RemoteReward:
    return RemoteReward(service.address, **({"timeout_s": 20} | values))


def test_a_served_function_is_the_function(socket_folder: Path) -> None:
    """Over several batches, with columns, token ids, the step and no opinion."""
    given: dict[str, Any] = {
        "prompts": ["p" * i for i in range(9)],
        "completions": ["", *("c" * i for i in range(8))],
        "completion_ids": [[i, 2 * i] for i in range(9)],
        "times": list(range(9)),
        "trainer_state": SimpleNamespace(global_step=100),
    }
    with rewards.served("seen", socket_folder) as service:
        (function,) = prepared(remote(service, batch_size=2))
        expected = rewards.seen(**given)
        assert function(**given, log_extra=print, log_metric=print) == expected
        assert expected[:3] == [None, None, 2 * (2 + 6) + 100]
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
        function.close()


def test_a_name_of_trls(socket_folder: Path) -> None:
    address = f"unix://{socket_folder}/trl.sock"
    command = [sys.executable, "-m", "trainer_service.rewards", "think_format_reward", "--addresses", address]
    with rewards.running(command, address, socket_folder) as service:
        chats = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
        assert remote(service)([[{"role": "user", "content": "q"}]] * 2, chats, [[1]] * 2) == [1.0, 0.0]


def test_a_bug_of_a_served_function_stays_in_its_log(socket_folder: Path) -> None:
    with rewards.served("seen", socket_folder) as service:
        with pytest.raises(Internal, match=r"the reward service seen at unix:///.* incident") as bug:
            remote(service)(["p"], ["c"])  # it wants a column
        assert "TypeError" not in bug.value.message
        assert "missing 1 required positional argument: 'times'" in service.log.read_text()


def test_a_service_with_a_token_wants_it(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (socket_folder / "token").write_text("right\n")
    with rewards.served("length", socket_folder, f"--token-file={socket_folder}/token") as service:
        for token in (None, "wrong"):
            with pytest.raises(Unauthenticated, match="the reward service length at"):
                prepared(remote(service, token=token))
        monkeypatch.setenv("TANDEM_REWARD_TOKEN", "right")
        (function,) = prepared([service.address])
        assert function(["p"], ["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tests.rewards:nothing", "--address=unix:///tmp/s"], "function: tests.rewards has no nothing"),
        (["tests.rewards:length", "--address=nowhere"], "addresses: 'nowhere' has no port"),
        (["tests.rewards:length"], "addresses: Field required"),
    ],
)
def test_what_cannot_be_served_is_told(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "trainer_service.rewards", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.fixture(params=["python", "node"])
def client(request: pytest.FixtureRequest, socket_folder: Path, tmp_path: Path) -> Iterator[Served]:
    """A service of clients/, in a process that has the contract and nothing else of Tandem."""
    address = f"unix://{socket_folder}/{request.param}.sock"
    if request.param == "python":
        for generated in (ROOT / "tandem").glob("*/v1/*_pb2*.py"):
            copied = tmp_path / generated.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(generated, copied)
            for folder in (copied.parent, copied.parent.parent, tmp_path / "tandem"):
                (folder / "__init__.py").touch()
        command = [sys.executable, str(CLIENTS / "python" / "reward.py"), address.replace("unix://", "unix:")]
    else:
        if NODE is None or not (CLIENTS / "node" / "node_modules").is_dir():
            pytest.skip("needs node, and `npm ci` in clients/node")
        command = [NODE, str(CLIENTS / "node" / "reward.js"), address]
    with rewards.running(command, address, socket_folder, {"PYTHONPATH": str(tmp_path)}) as service:
        yield service


def test_a_service_in_another_language(client: Served) -> None:
    """Texts and chats, no opinion, several batches, more than one message of gRPC's default size."""
    function = remote(client, batch_size=2)
    function.check()
    chat = [{"role": "user", "content": "What is 2 + 5?"}]
    turns = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "name": "add", "content": "7"},
        {"role": "assistant", "content": " is it, so 7"},
    ]
    prompts = ["What is 3 + 4?"] * 4 + [chat]
    completions = ["7", "It is 8", "none", "7", turns]
    answer = ["7", "7", "7", None, "7"]
    assert function(prompts, completions, [[1, 2**31]] * 5, answer=answer)[:3] == [1.0, 0.0, 0.0]
    assert function(prompts, completions, [[1]] * 5, other=answer) == [None] * 5
    assert function([chat], [turns], [[1]], answer=["7"]) == [1.0]
    assert remote(client)(["p"] * 6, ["x" * 2**20 + "7"] * 6, [[1]] * 6, answer=["7"] * 6) == [1.0] * 6


def test_a_judge_asks_the_engine(llama: Service) -> None:
    """What it says is how probable the model itself finds 0 and 1, whichever comes first."""
    inference = InferenceClient(llama.address)
    judge = EngineJudge(inference, system="", question="{prompt} 0:{first} 1:{second} Which?")
    pairs = [["red", "blue"], ["up", "down"], ["same", "same"]]

    def zero(prompt: str, first: str, second: str) -> float:
        chat = [{"role": "user", "content": f"{prompt} 0:{first} 1:{second} Which?"}]
        (ids,) = inference.tokenize([chat])
        asked = inference.score([[*ids, token] for token in (_byte("0"), _byte("1"))])
        chances = [float(score.logprobs[-1]) for score in asked]
        return 1 / (1 + 2.718281828459045 ** (chances[1] - chances[0]))

    def _byte(char: str) -> int:
        return inference.tokenize([char])[0][-1]

    try:
        prompts = ["Best?", [{"role": "user", "content": "Best?"}], "Best?"]
        once = judge.judge(prompts, pairs, shuffle_order=False, return_scores=True)
        wanted = [zero("Best?", *pair) for pair in pairs]
        assert once == pytest.approx(wanted, abs=0.02)
        both = judge.judge(prompts, pairs, return_scores=True)
        swapped = [1 - zero("Best?", b, a) for a, b in pairs]
        assert both == pytest.approx([(a + b) / 2 for a, b in zip(wanted, swapped, strict=True)], abs=0.02)
        assert both[2] == pytest.approx(0.5, abs=0.02), "two that are the same are as good as each other"
        mirrored = judge.judge(prompts, [[b, a] for a, b in pairs], return_scores=True)
        assert mirrored == pytest.approx([1 - value for value in both], abs=0.02)
        assert judge.judge([], []) == []
        ranks = judge.judge(prompts[:2], pairs[:2])
        assert ranks == [0 if value >= 0.5 else 1 for value in both[:2]]
        blocks = [pair[0] for pair in pairs[:2]] + [pair[1] for pair in pairs[:2]]
        first = [1.0 - rank for rank in ranks]
        assert JudgeReward(judge)(prompts[:2] * 2, blocks) == [*first, *(1 - value for value in first)]
        with pytest.raises(InvalidArgument) as caught:
            judge.judge(["Best?"], [["x" * 300, "y"]])
        assert caught.value.reason is Reason.PROMPT_TOO_LONG
    finally:
        inference.close()
