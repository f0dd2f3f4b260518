"""Rules of the house that no type checker knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("tandem", "weight_transfer", "inference_service", "trainer_service")
SOURCES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "_pb2" not in path.name
)
#: Modules that turn another process's bytes into running code, and vLLM's switch that lets it do so.
FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
SWITCH = "VLLM_ALLOW_INSECURE_SERIALIZATION"
#: Collectives of torch.distributed and accelerate that pickle what they carry.
COLLECTIVES = ("broadcast_object_list", "scatter_object_list", "send_object_list", "gather_object")


def test_there_are_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_crosses_a_process(path: Path) -> None:
    text = path.read_text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert not imported & FORBIDDEN
    assert SWITCH not in text
    assert "torch.load(" not in text
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
