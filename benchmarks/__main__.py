"""Measure, write the figures as JSON, and the table that docs/benchmarks.md shows.

python -m benchmarks [--model FOLDER] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import contenders, sync
from benchmarks.measure import cpu_seconds, percentiles, provenance
from benchmarks.report import write_table
from benchmarks.workload import ENGINE, LATENCY, THROUGHPUT, Workload

LOADERS = ("live", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--rounds", type=int, default=8, help="of throughput; latency gets 5 times as many")
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
        live, packed = (
            stack.enter_context(contenders.in_process(arguments.model, folder, loader)) for loader in LOADERS
        )
        http = [stack.enter_context(contenders.http(arguments.model, folder, loader)) for loader in LOADERS]
        everyone: list[contenders.Contender] = [tandem, live, packed, *http]
        print(f"{len(everyone)} engines are up", flush=True)
        latency = _rounds(everyone, LATENCY, 5 * arguments.rounds)
        throughput = _rounds(everyone, THROUGHPUT, arguments.rounds)
        results["latency_ms"] = {
            name: percentiles([1e3 * t.seconds for t in ts]) for name, ts in latency.items()
        }
        results["tokens_per_second"] = {
            name: percentiles([THROUGHPUT.tokens / t.seconds for t in ts]) for name, ts in throughput.items()
        }
        results["cpu_us_per_token"] = {
            name: statistics.mean(1e6 * t.cpu_seconds / THROUGHPUT.tokens for t in ts)
            for name, ts in throughput.items()
        }
        packed.layerwise_reload()
        reloads = [1e3 * packed.layerwise_reload() for _ in range(4 * arguments.rounds)]
        results["sync"] = sync.measure(tandem, arguments.model, 4 * arguments.rounds)
        results["sync"]["vLLM's layerwise reload"] = {"ms": percentiles(reloads)}
    results["ratios"] = _ratios(throughput, latency, results["cpu_us_per_token"], results["sync"])
    results["load_average_after"] = os.getloadavg()[0]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    write_table(results, Path("docs/benchmarks.md"))
    print(json.dumps(results["ratios"], indent=2))
    print(f"figures in {arguments.out}, table in docs/benchmarks.md")


class Turn(NamedTuple):
    """One contender's turn in one round.

    cpu_seconds: computed beside the engine, by the process in front of it and by whoever asks that.
    """

    seconds: float
    cpu_seconds: float


def _rounds(everyone: list[contenders.Contender], work: Workload, rounds: int) -> dict[str, list[Turn]]:
    """Each contender in turn, round by round, another first in each: a drift of the machine hits all alike.

    The first round is warm-up.
    """
    found: dict[str, list[Turn]] = {contender.name: [] for contender in everyone}
    for seed in range(rounds + 1):
        first = seed % len(everyone)
        for contender in everyone[first:] + everyone[:first]:
            before = cpu_seconds(contender.pid) + time.process_time()
            seconds = contender.generate(work, seed)
            beside = cpu_seconds(contender.pid) + time.process_time() - before
            if seed:
                found[contender.name].append(Turn(seconds, beside))
        print(f"{work}: round {seed} of {rounds}", flush=True)
    return found


def _ratios(
    throughput: dict[str, list[Turn]],
    latency: dict[str, list[Turn]],
    cpu: dict[str, float],
    syncs: dict[str, Any],
) -> dict[str, float]:
    """Of two contenders in the same round, and of those the median: what the machine does besides hits both."""
    tandem, live, packed, http_live, http_packed = throughput
    peers = {
        "tandem / same AsyncLLM in process": (tandem, live),
        "tandem / vllm serve over HTTP, same weights": (tandem, http_live),
        "tandem / vllm serve over HTTP, packed weights": (tandem, http_packed),
        "live / packed weights (a CPU's)": (live, packed),
    }
    ratios = {}
    for name, (one, other) in peers.items():
        pairs = zip(throughput[one], throughput[other], strict=True)
        ratios[f"throughput, {name}"] = statistics.median(b.seconds / a.seconds for a, b in pairs)
    for name, (one, other) in peers.items():
        pairs = zip(latency[one], latency[other], strict=True)
        ratios[f"latency, {name}"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
    for name, (one, other) in list(peers.items())[:2]:
        ratios[f"CPU beside the engine, {name}"] = cpu[one] / cpu[other]
    reload = syncs["vLLM's layerwise reload"]["ms"]["p50"]
    for name, figures in syncs.items():
        if name.partition(" ")[0] in ("aliased", "written", "stream"):
            ratios[f"sync, {name} / vLLM's layerwise reload"] = figures["ms"]["p50"] / reload
    return {name: round(ratio, 4) for name, ratio in ratios.items()}


if __name__ == "__main__":
    main()
