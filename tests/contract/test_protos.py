"""The protos are lint-clean and only grow.

After a change that only grows them, refresh the image that the next change is compared with, from the root:

    buf build protos -o tests/contract/tandem.binpb
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
IMAGE = Path(__file__).parent / "tandem.binpb"
BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

pytestmark = pytest.mark.skipif(BUF is None, reason="buf is not installed: pip install buf-bin")


def buf(*arguments: str | Path) -> str:
    """Run buf, and return what it complains about."""
    assert BUF is not None
    done = subprocess.run([BUF, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 100), done.stderr
    return done.stdout


def test_lint() -> None:
    assert buf("lint", PROTOS) == ""


def test_format() -> None:
    assert buf("format", PROTOS, "--diff") == ""


def test_nothing_was_taken_back() -> None:
    assert buf("breaking", PROTOS, "--against", IMAGE) == ""


def test_taking_something_back_is_found(tmp_path: Path) -> None:
    shutil.copytree(PROTOS, tmp_path / "protos")
    engine = tmp_path / "protos/tandem/engine/v1/engine.proto"
    engine.write_text(engine.read_text().replace("string reason = 2;", "string why = 2;"))
    assert "changed name from" in buf("breaking", tmp_path / "protos", "--against", IMAGE)


def test_the_generated_code_is_that_of_the_protos() -> None:
    """Stale generated code would pass every other test."""
    from google.protobuf import descriptor_pb2

    from tandem.engine.v1 import engine_pb2
    from tandem.inference.v1 import inference_pb2
    from tandem.reward.v1 import reward_pb2
    from tandem.trainer.v1 import job_pb2, trainer_pb2
    from tandem.weights.v1 import weights_pb2

    assert BUF is not None
    command = [BUF, "build", str(PROTOS), "--exclude-source-info", "--as-file-descriptor-set", "-o", "-"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True).stdout
    files = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(built).file}
    modules = [engine_pb2, inference_pb2, job_pb2, reward_pb2, trainer_pb2, weights_pb2]
    assert {name for name in files if name.startswith("tandem/")} == {m.DESCRIPTOR.name for m in modules}
    for module in modules:
        generated = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        wanted = descriptor_pb2.FileDescriptorProto.FromString(
            files[module.DESCRIPTOR.name].SerializeToString()
        )
        wanted.ClearField("source_code_info")
        generated.ClearField("source_code_info")
        assert shape(generated) == shape(wanted)


def shape(file: object) -> object:
    """Without json_name, which buf writes and protoc leaves out."""
    from google.protobuf import json_format

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "jsonName"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json_format.MessageToDict(file))  # type: ignore[arg-type]
