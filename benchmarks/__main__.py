"""Measure, write the figures as JSON, and the table that docs/benchmarks.md shows.

python -m benchmarks [--model FOLDER] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import contenders, sync
from benchmarks.measure import percentiles, provenance
from benchmarks.report import write_table
from benchmarks.workload import ENGINE, LATENCY, THROUGHPUT, Workload


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=5, help="of throughput; latency gets 8 times as many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"no model in {arguments.model}: `make demo` prepares it")
    results: dict[str, Any] = provenance() | {
        "model": arguments.model.name,
        "engine": ENGINE,
        "workloads": {"throughput": vars(THROUGHPUT), "latency": vars(LATENCY)},
    }
    with tempfile.TemporaryDirectory(prefix="tdm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        tandem = stack.enter_context(contenders.tandem(arguments.model, folder))
        live = stack.enter_context(contenders.in_process(arguments.model, folder, "live"))
        packed = stack.enter_context(contenders.in_process(arguments.model, folder, "packed"))
        http = stack.enter_context(contenders.http(arguments.model, folder))
        everyone: list[contenders.Contender] = [tandem, live, packed, http]
        print(f"{len(everyone)} engines are up", flush=True)
        results["latency_ms"] = {
            name: percentiles([1e3 * s for s in seconds])
            for name, seconds in _rounds(everyone, LATENCY, 8 * arguments.rounds).items()
        }
        results["tokens_per_second"] = {
            name: percentiles([THROUGHPUT.tokens / s for s in seconds])
            for name, seconds in _rounds(everyone, THROUGHPUT, arguments.rounds).items()
        }
        packed.layerwise_reload()
        reloads = [1e3 * packed.layerwise_reload() for _ in range(4 * arguments.rounds)]
        results["sync"] = sync.measure(tandem, arguments.model, 4 * arguments.rounds)
        results["sync"]["vLLM's layerwise reload"] = {"ms": percentiles(reloads)}
    results["ratios"] = _ratios(results)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    write_table(results, Path("docs/benchmarks.md"))
    print(json.dumps(results["ratios"], indent=2))
    print(f"figures in {arguments.out}, table in docs/benchmarks.md")


def _rounds(everyone: list[contenders.Contender], work: Workload, rounds: int) -> dict[str, list[float]]:
    """Each contender in turn, round by round: a drift of the machine hits all alike. The first is warm-up."""
    found: dict[str, list[float]] = {contender.name: [] for contender in everyone}
    for seed in range(rounds + 1):
        for contender in everyone:
            seconds = contender.generate(work, seed)
            if seed:
                found[contender.name].append(seconds)
        print(f"{work}: round {seed} of {rounds}", flush=True)
    return found


def _ratios(results: dict[str, Any]) -> dict[str, float]:
    def p50(kind: str, name: str) -> float:
        return float(results[kind][name]["p50"])

    names = list(results["tokens_per_second"])
    tandem, live, packed, http = names
    reload = results["sync"]["vLLM's layerwise reload"]["ms"]["p50"]
    ratios = {}
    for kind, unit in (("throughput", "tokens_per_second"), ("latency", "latency_ms")):
        ratios[f"{kind}, tandem / same AsyncLLM in process"] = p50(unit, tandem) / p50(unit, live)
        ratios[f"{kind}, tandem / vllm serve over HTTP"] = p50(unit, tandem) / p50(unit, http)
        ratios[f"{kind}, live / packed weights (a CPU's)"] = p50(unit, live) / p50(unit, packed)
    for name, figures in results["sync"].items():
        if name.partition(" ")[0] in ("aliased", "written", "stream"):
            ratios[f"sync, {name} / vLLM's layerwise reload"] = figures["ms"]["p50"] / reload
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


if __name__ == "__main__":
    main()
