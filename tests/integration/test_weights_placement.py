"""Where vLLM put a checkpoint's tensors, as seen while it loaded them."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults import checkpoints as more
from tests.models import SMALL
from tests.services import ENVIRONMENT

Loaded = dict[str, Any]

HIDDEN, HEADS, KV_HEADS = SMALL["hidden_size"], SMALL["num_attention_heads"], SMALL["num_key_value_heads"]
HEAD = HIDDEN // HEADS
Q, KV, INNER = HEADS * HEAD, KV_HEADS * HEAD, SMALL["intermediate_size"]
ITEMSIZE = 2


def run(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def paths(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: more.make(tmp_path_factory.mktemp(name), name) for name in more.CONFIGS}
    made["redundant"] = more.with_output_layer(tmp_path_factory.mktemp("redundant"), 1.0)
    made["untied"] = more.with_output_layer(tmp_path_factory.mktemp("untied"), 2.0)
    return checkpoints | made


@pytest.fixture(scope="module")
def loaded(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """What each checkpoint became, all in one process, since vLLM's import takes longest."""
    out = tmp_path_factory.mktemp("loads") / "loads.json"
    run("tests.faults.loads", out, *paths.values())
    found = json.loads(out.read_text())
    return {name: found[str(path)] for name, path in paths.items()}


def address(loaded: Loaded, name: str) -> int:
    """Of a tensor that lies in one block."""
    ((arena, offset, shape, first),) = loaded["placements"][name]["blocks"]
    assert math.prod(shape) == math.prod(loaded["placements"][name]["shape"])
    assert first == 0
    return int(loaded["arenas"][arena][0] + offset)


def layers(fused: str, *parts: tuple[str, int]) -> list[tuple[str, str, int, int]]:
    """(part, fused parameter, first row, rows) in both layers."""
    found, row = [], 0
    for part, rows in parts:
        found += [(f"model.layers.{i}.{part}", f"model.layers.{i}.{fused}", row, rows) for i in range(2)]
        row += rows
    return found


QKV = [("self_attn.q_proj", Q), ("self_attn.k_proj", KV), ("self_attn.v_proj", KV)]
WEIGHTS = [(f"{part}.weight", rows) for part, rows in QKV]
FUSED = [
    *layers("self_attn.qkv_proj.weight", *WEIGHTS),
    *layers("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", INNER), ("mlp.up_proj.weight", INNER)),
]
BIASES = layers("self_attn.qkv_proj.bias", *[(f"{part}.bias", rows) for part, rows in QKV])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_every_tensor_is_one_contiguous_block(loaded: dict[str, Loaded], name: str) -> None:
    one = loaded[name]
    assert sorted(one["placements"]) == one["checkpoint"]
    assert (one["reason"], one["reloaded"], len(one["arenas"])) == ("", [], 1)
    for placement in one["placements"].values():
        assert len(placement["blocks"]) == 1
        assert (placement["alias"], placement["dtype"]) == ("", "bfloat16")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "bloom", "gpt2", "redundant", "untied"])
def test_what_lies_there_is_the_checkpoint_bit_for_bit(
    loaded: dict[str, Loaded], paths: dict[str, Path], name: str
) -> None:
    there = load_file(paths[name] / "model.safetensors")
    for tensor, placement in loaded[name]["placements"].items():
        assert placement["whole"], f"{tensor} is not what the checkpoint has"
        assert placement["shape"] == list(there[tensor].shape)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_parts_of_fused_parameters_are_at_their_rows(loaded: dict[str, Loaded], name: str) -> None:
    one = loaded[name]
    for part, fused, row, rows in FUSED + (BIASES if name == "qwen2" else []):
        start, shape = one["parameters"][fused]
        width = math.prod(shape[1:])
        assert address(one, part) == start + row * width * ITEMSIZE, part
        assert one["placements"][part]["shape"] == [rows, *shape[1:]]
    total = Q + 2 * KV
    assert one["parameters"]["model.layers.0.self_attn.qkv_proj.weight"][1] == [total, HIDDEN]
    assert one["parameters"]["model.layers.1.mlp.gate_up_proj.weight"][1] == [2 * INNER, HIDDEN]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_everything_else_is_at_its_parameters_own_address(loaded: dict[str, Loaded], name: str) -> None:
    one = loaded[name]
    fused = {part for part, *_ in FUSED + BIASES}
    plain = [tensor for tensor in one["placements"] if tensor not in fused]
    assert plain
    for tensor in plain:
        assert address(one, tensor) == one["parameters"][tensor][0], tensor


def test_the_parts_that_each_architecture_is_here_for(loaded: dict[str, Loaded]) -> None:
    llama, qwen2, qwen3 = (set(loaded[name]["placements"]) for name in ("llama", "qwen2", "qwen3"))
    assert "lm_head.weight" not in llama | qwen3, "tied"
    assert "lm_head.weight" in qwen2
    assert {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"} <= qwen2
    assert {f"model.layers.0.self_attn.{p}_norm.weight" for p in "qk"} <= qwen3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_every_parameter_is_arena_memory_of_its_own(loaded: dict[str, Loaded], name: str) -> None:
    ((start, size),) = loaded[name]["arenas"]
    spans = sorted({(p, p + math.prod(shape) * ITEMSIZE) for p, shape in loaded[name]["parameters"].values()})
    assert start <= spans[0][0]
    assert spans[-1][1] <= start + size
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % 256 == start % 256 for begin, _ in spans)


def test_a_padded_embedding_leaves_its_padding_alone(loaded: dict[str, Loaded]) -> None:
    embed = "model.embed_tokens.weight"
    rows = loaded["llama"]["parameters"][embed][1][0]
    assert loaded["llama"]["placements"][embed]["shape"] == [SMALL["vocab_size"], HIDDEN]
    assert rows > SMALL["vocab_size"]
    assert rows % 64 == 0


def test_what_loading_reshapes_goes_through_vllms_own_loading(loaded: dict[str, Loaded]) -> None:
    one = loaded["bloom"]
    assert len(one["arenas"]) == 2
    reshaped = [name for name in one["checkpoint"] if "query_key_value" in name]
    assert one["reloaded"] == reshaped
    assert len(reshaped) == 4
    for name, placement in one["placements"].items():
        assert [block[0] for block in placement["blocks"]] == [1 if name in reshaped else 0]
    assert sorted(one["placements"]) == one["checkpoint"], "and an update carries them like all others"


def test_transposed_copies_are_placed_and_not_aliased(loaded: dict[str, Loaded]) -> None:
    one = loaded["gpt2"]
    assert (one["reloaded"], sorted(one["placements"])) == ([], one["checkpoint"])
    inner = one["placements"]["transformer.h.0.mlp.c_fc.weight"]
    assert inner["alias"] == "the engine holds it in another memory order"
    fused = one["placements"]["transformer.h.0.attn.c_attn.weight"]
    assert (fused["alias"], len(fused["blocks"])) == ("it lies in 3 blocks", 3)
    assert one["placements"]["transformer.h.0.ln_1.weight"]["alias"] == ""


def test_a_redundant_output_layer_is_nobodys(loaded: dict[str, Loaded]) -> None:
    """vLLM loads it, finds it equal to the embedding, and ties it after all: its memory is read no more."""
    one = loaded["redundant"]
    assert set(one["checkpoint"]) - set(one["placements"]) == {"lm_head.weight"}
    assert "lm_head.weight" not in one["parameters"]


def test_an_output_layer_of_its_own_is_placed_whatever_the_config_says(loaded: dict[str, Loaded]) -> None:
    one = loaded["untied"]
    assert sorted(one["placements"]) == one["checkpoint"]
    assert address(one, "lm_head.weight") != address(one, "model.embed_tokens.weight")


@pytest.mark.parametrize("name", ["deepseek_v2", "mixtral", "qwen3_moe"])
def test_experts_lie_where_they_were_loaded_and_are_packed_from_there(
    loaded: dict[str, Loaded], name: str
) -> None:
    """vLLM computes with packed ones, elsewhere: the loader has seen that it makes the same of what lies here."""
    one = loaded[name]
    experts = [tensor for tensor in one["checkpoint"] if ".experts." in tensor]
    assert len(experts) == 12
    assert (one["reason"], sorted(one["reloaded"]), len(one["arenas"])) == ("", experts, 1)
    assert sorted(one["placements"]) == one["checkpoint"]
    for placement in one["placements"].values():
        assert (placement["alias"], placement["whole"]) == ("", True)
    ((start, size),) = one["arenas"]
    elsewhere = [n for n, (at, _) in one["parameters"].items() if not start <= at < start + size]
    assert {n.rpartition(".")[2] for n in elsewhere} == {"w13_weight", "w2_weight"}


def test_the_engines_parameters_are_where_the_service_says(
    paths: dict[str, Path], loaded: dict[str, Loaded], tmp_path: Path
) -> None:
    """After all that an engine does beyond loading: in a real worker, and as the service sees its arenas."""
    out = tmp_path / "engine.json"
    run("tests.faults.engine_addresses", out, paths["qwen3"])
    engine = json.loads(out.read_text())
    first = min(engine["addresses"].values())
    there = loaded["qwen3"]
    base = min(start for start, _ in there["parameters"].values())
    assert {name: at - first for name, at in engine["addresses"].items()} == {
        name: start - base for name, (start, _) in there["parameters"].items()
    }
    assert engine["offsets"] == {n: p["blocks"][0][1] for n, p in there["placements"].items()}
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        assert engine["addresses"][name] - first == engine["offsets"][name]
