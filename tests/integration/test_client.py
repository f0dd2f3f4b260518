"""The Python client and the command, with the real inference service."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tandem.client import AsyncTandemClient, TandemClient
from tandem.errors import DeadlineExceeded, InvalidArgument
from tests.services import Service


def test_prompts_of_each_kind(llama: Service) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with TandemClient(inference=llama.address) as client:
        rollouts = client.generate(["hi", [5, 6, 7], chat], n=2, max_tokens=4, ignore_eos=True, seed=7)
        again = client.generate(
            ["hi", [5, 6, 7], chat], n=2, max_tokens=4, ignore_eos=True, seed=7, logprobs=True
        )
        assert client.generate("hi", max_tokens=4, temperature=0) == client.generate(
            ["hi"], max_tokens=4, temperature=0
        )
    assert [(r.prompt_index, r.rollout_index) for r in rollouts] == [
        (p, n) for p in range(3) for n in range(2)
    ]
    assert [r.token_ids for r in rollouts] == [r.token_ids for r in again]
    for plain, full in zip(rollouts, again, strict=True):
        assert (len(plain.token_ids), plain.finish_reason, plain.logprobs) == (4, "LENGTH", ())
        assert len(full.logprobs) == 4
        assert sum(count for _, count in plain.weight_versions) == 4


def test_pieces_are_the_whole(llama: Service) -> None:
    with TandemClient(inference=llama.address) as client:
        (whole,) = client.generate("hi", max_tokens=200, temperature=0, ignore_eos=True)
        pieces = list(client.stream("hi", max_tokens=200, temperature=0, ignore_eos=True))
        assert len(pieces) > 1
        assert "".join(piece.text for piece in pieces) == whole.text
        assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["LENGTH"]
        for piece in client.stream("hi", max_tokens=200, ignore_eos=True):
            assert piece.token_ids
            break  # the rest is cancelled: the session's fixture is left idle


async def test_with_asyncio(llama: Service) -> None:
    async with AsyncTandemClient(inference=llama.address) as client:
        (whole,) = await client.generate("hi", max_tokens=8, temperature=0)
        pieces = [piece async for piece in client.stream("hi", max_tokens=8, temperature=0)]
    assert "".join(piece.text for piece in pieces) == whole.text


def test_errors_are_the_services(llama: Service) -> None:
    with TandemClient(inference=llama.address) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.generate("hi", top_p=3.0)
        assert [violation.field for violation in caught.value.violations] == ["sampling.top_p"]
        with pytest.raises(DeadlineExceeded):
            client.generate("hi", n=64, max_tokens=200, ignore_eos=True, timeout_s=0.01)


def tandem(*arguments: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tandem.cli", *arguments],
        input=text,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_streams_text(llama: Service) -> None:
    with TandemClient(inference=llama.address) as client:
        (whole,) = client.generate("hi", max_tokens=8, temperature=0)
    done = tandem(
        *("generate", "--max-tokens", "8", "--temperature", "0", "--param", "top_k=0"),
        text="hi",
        TANDEM_INFERENCE_ADDRESS=llama.address,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (whole.text if whole.text.endswith("\n") else f"{whole.text}\n")
    chat = tandem("generate", "hi", "--system", "be brief", "--max-tokens", "2", "--inference", llama.address)
    assert (chat.returncode, chat.stderr) == (0, "")
    wrong = tandem("generate", "hi", "--top-p", "3", "--inference", llama.address)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("tandem: FIELD_INVALID: sampling.top_p")


def test_the_doctor_finds_the_service(llama: Service) -> None:
    done = tandem("doctor", "--inference", llama.address, "--trainer", llama.address)
    assert f"ok    inference service: serves at {llama.address}\n" in done.stdout
    assert (
        f"ok    inference processes: process {llama.process.pid}, in the same PID namespace\n" in done.stdout
    )
    assert f"mend  trainer service: another service is at {llama.address}\n" in done.stdout
    assert done.returncode == 1
