"""What the README shows is what runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tandem.weights.v1 import weights_pb2
from tests.services import ENVIRONMENT, Service

ROOT = Path(__file__).parents[2]


def test_ten_lines_work(llama: Service, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1] == (ROOT / "examples/quickstart.py").read_text()
    script = block[1]
    for old, new in {
        "out/models/SmolLM2-135M-Instruct": str(checkpoints["llama"]),
        "unix:///tmp/tandem/inference.sock": llama.address,
    }.items():
        assert old in script
        script = script.replace(old, new)

    before = _version(llama).weight_version
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PATH": "/usr/bin:/bin"},
        timeout=180,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = _version(llama)
    # The first update writes the policy; each of the three steps is one more.
    assert after.weight_version == before + 4
    assert after.state == weights_pb2.WEIGHT_STATE_COMMITTED
    llama.weights.RestoreCheckpoint(weights_pb2.RestoreCheckpointRequest(), timeout=30)


def test_its_numbers_were_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    said = re.search(
        r"takes ([\d.]+) ms \(median of (\d+);.*?moves (\d+) bytes.*?from ([\d.]+) to ([\d.]+), in (\d+) s",
        readme,
        re.DOTALL,
    )
    assert said is not None
    run = json.loads((ROOT / "benchmarks/results/demo.json").read_text())["runs"][0]
    assert said.groups() == (
        f"{run['sync_ms_p50']:.1f}",
        str(run["steps"]),
        str(run["bytes_moved_per_sync"]),
        f"{run['reward_before']:.2f}",
        f"{run['reward_after']:.2f}",
        f"{run['seconds']:.0f}",
    )


def _version(service: Service) -> weights_pb2.GetWeightVersionResponse:
    return service.weights.GetWeightVersion(weights_pb2.GetWeightVersionRequest(), timeout=10)


def test_the_file_tree_names_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = re.findall(r"^    ([a-z_]+/|Makefile|setup\.py) +\S", readme, re.MULTILINE)
    assert len(tree) >= 10
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    here = {f"{path.partition('/')[0]}/" if "/" in path else path for path in listed.stdout.split()}
    assert set(tree) <= here
    unexplained = {name for name in here if name.endswith("/") and not name.startswith(".")} - set(tree)
    assert not unexplained, f"the README does not say what these are for: {sorted(unexplained)}"
