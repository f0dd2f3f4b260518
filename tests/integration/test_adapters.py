"""LoRA adapters: loaded, used, replaced, forgotten. In float32, against PEFT's own forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tandem.engine.v1 import engine_pb2
from tandem.errors import InvalidArgument, NotFound, Reason
from tandem.inference.v1 import inference_pb2 as pb
from tests.integration.calls import (
    LONG,
    Reading,
    generate,
    idle,
    ids,
    joined,
    one,
    refused,
    request,
    score,
    stats,
    until,
)
from tests.services import Service

PROMPTS = [[5], [40, 41, 42, 43], list(range(3, 203))]
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapters(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that change the model a lot."""
    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
                parameter.normal_(0, 0.1)
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
    return folders


Logprobs = Callable[[list[int], int], torch.Tensor]


@pytest.fixture(scope="module")
def by_peft(checkpoints: dict[str, Path], adapters: dict[str, Path]) -> dict[str, Logprobs]:
    """Logprobs of a sequence's tokens from one on, by PEFT and, as "", by the bare model."""

    def forward(model: torch.nn.Module) -> Logprobs:
        @torch.no_grad()
        def logprobs(sequence: list[int], start: int) -> torch.Tensor:
            all_logprobs = model(torch.tensor([sequence])).logits[0, start - 1 : -1].log_softmax(-1)
            return all_logprobs.gather(-1, torch.tensor(sequence[start:])[:, None])[:, 0]

        return logprobs

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()

    found = {name: forward(PeftModel.from_pretrained(base(), path).eval()) for name, path in adapters.items()}
    return found | {"": forward(base())}


@pytest.fixture(autouse=True)
def _forgotten(exact: Service) -> Iterator[None]:
    yield
    for name in stats(exact).loras:
        unload(exact, name)
    idle(exact)


def load(service: Service, name: str, path: Path) -> None:
    service.engine.LoadLora(engine_pb2.LoadLoraRequest(name=name, path=str(path)), timeout=30)


def unload(service: Service, name: str) -> None:
    service.engine.UnloadLora(engine_pb2.UnloadLoraRequest(name=name), timeout=30)


def check(service: Service, lora: str, wanted: Logprobs) -> None:
    """Rollouts and scores with an adapter are those of a model."""
    sampling = {"seed": 1, "ignore_eos": True, "max_tokens": 12}
    rollouts = generate(service, *map(ids, PROMPTS), sampling=sampling, lora=lora)
    for index, prompt in enumerate(PROMPTS):
        rollout = rollouts[index, 0]
        sequence = [*prompt, *rollout.token_ids]
        assert list(rollout.logprobs) == pytest.approx(wanted(sequence, len(prompt)).tolist(), abs=1e-4)
        (found,) = score(service, sequence, lora=lora)
        assert list(found.logprobs) == pytest.approx(wanted(sequence, 1).tolist(), abs=1e-4)


def test_rollouts_and_scores_are_of_the_adapter_asked_for(
    exact: Service, adapters: dict[str, Path], by_peft: dict[str, Logprobs]
) -> None:
    load(exact, "a", adapters["one"])
    load(exact, "b", adapters["two"])
    assert list(stats(exact).loras) == ["a", "b"]
    for _ in range(2):  # the engine has room for one of them: they take turns
        check(exact, "a", by_peft["one"])
        check(exact, "b", by_peft["two"])
        check(exact, "", by_peft[""])


def test_adapters_and_the_bare_model_run_side_by_side(
    exact: Service, adapters: dict[str, Path], by_peft: dict[str, Logprobs]
) -> None:
    load(exact, "a", adapters["one"])
    load(exact, "b", adapters["two"])
    sampling = {"seed": 2, "ignore_eos": True, "max_tokens": 60}
    readings = {
        lora: Reading(exact, request(*map(ids, PROMPTS), sampling=sampling, lora=lora))
        for lora in ("a", "b", "")
    }
    for lora, reading in readings.items():
        for (index, _), rollout in joined(reading.end()).items():
            sequence = [*PROMPTS[index], *rollout.token_ids]
            wanted = by_peft[{"a": "one", "b": "two", "": ""}[lora]](sequence, len(PROMPTS[index]))
            assert list(rollout.logprobs) == pytest.approx(wanted.tolist(), abs=1e-4)


def test_an_adapter_can_be_replaced_in_its_folder(
    exact: Service, adapters: dict[str, Path], by_peft: dict[str, Logprobs], tmp_path: Path
) -> None:
    """As after each step of a training run. Nothing cached under the name may be used on."""
    folder = tmp_path / "current"
    for name in ("one", "two", "one"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapters[name], folder)
        load(exact, "current", folder)
        check(exact, "current", by_peft[name])
    assert list(stats(exact).loras) == ["current"]


def test_an_adapters_folder_is_not_needed_any_more(
    exact: Service, adapters: dict[str, Path], by_peft: dict[str, Logprobs], tmp_path: Path
) -> None:
    shutil.copytree(adapters["one"], tmp_path / "gone")
    load(exact, "a", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    load(exact, "b", adapters["two"])  # which takes the engine's only place
    check(exact, "b", by_peft["two"])
    check(exact, "a", by_peft["one"])


def test_what_runs_with_an_adapter_ends_with_it(
    exact: Service, adapters: dict[str, Path], by_peft: dict[str, Logprobs]
) -> None:
    load(exact, "a", adapters["one"])
    for change in (lambda: load(exact, "a", adapters["two"]), lambda: unload(exact, "a")):
        wanted = by_peft["one" if change.__code__.co_names[0] == "load" else "two"]
        asked = request(ids([5], 16), sampling=LONG, lora="a", output_mode=pb.OUTPUT_MODE_DELTAS)
        reading = Reading(exact, asked)
        until(lambda reading=reading: reading.pieces, 10, "rollouts are under way")
        change()
        for rollout in joined(reading.end()).values():
            found = wanted([5, *rollout.token_ids], 1).tolist()
            assert list(rollout.logprobs) == pytest.approx(found, abs=1e-4)
        assert reading.error is None
    error = refused(lambda: one(exact, ids([5]), lora="a"))
    assert isinstance(error, NotFound)
    assert not stats(exact).loras


def test_a_folder_that_holds_no_adapter_is_named(
    exact: Service, adapters: dict[str, Path], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    load(exact, "a", adapters["one"])
    config = json.loads((adapters["one"] / "adapter_config.json").read_text())
    tensors = load_file(adapters["one"] / "adapter_model.safetensors")

    def made(name: str, change: dict[str, object], weights: dict[str, torch.Tensor] | bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        if isinstance(weights, bytes):
            (folder / "adapter_model.safetensors").write_bytes(weights)
        else:
            save_file(weights, folder / "adapter_model.safetensors")
        return folder

    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128)}
    embeddings = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 259)}
    (tmp_path / "bare").mkdir()
    for path in (
        tmp_path / "nowhere",
        tmp_path / "bare",
        checkpoints["llama"],
        made("rank", {"r": 64}, tensors),
        made("garbage", {}, b"garbage"),
        made("cut", {}, (adapters["one"] / "adapter_model.safetensors").read_bytes()[:-100]),
        made("head", {"target_modules": ["lm_head"]}, tensors | head),
        made("embeddings", {"target_modules": ["embed_tokens"]}, tensors | embeddings),
        made("foreign", {}, {name.replace("layers.1", "layers.77"): t for name, t in tensors.items()}),
        made("shape", {}, {name: t[:, :3].contiguous() for name, t in tensors.items()}),
    ):
        error = refused(lambda path=path: load(exact, "a", path))
        assert isinstance(error, InvalidArgument), path
        assert error.reason == Reason.FIELD_INVALID
        assert [violation.field for violation in error.violations] == ["path"]
    for field in ("name", "path"):
        fields = {"name": "x", "path": "/x"} | {field: ""}
        error = refused(
            lambda fields=fields: exact.engine.LoadLora(engine_pb2.LoadLoraRequest(**fields), timeout=5)
        )
        assert [violation.field for violation in error.violations] == [field]
    # The one that was there before is still there, and works.
    assert list(stats(exact).loras) == ["a"]
    assert len(one(exact, ids([5]), sampling=LONG, lora="a").token_ids) == 200
