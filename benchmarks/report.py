"""The figures as a Markdown page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEAD = """# Benchmarks

Made by `make bench`; the figures are in [benchmarks/results](../benchmarks/results). All contenders were up
at once and took turns, round by round, another first in each, on the same prompts. The first round of each is warm-up
and not counted. A ratio is the median over the rounds of what it is in each, so that what else the machine does, which
hits both, counts little.

"""


def write_table(results: dict[str, Any], path: Path) -> None:
    """Write the page."""
    hardware, versions = results["hardware"], results["versions"]
    made_with = [f"{name} {version}" for name, version in versions.items() if version]
    lines = [
        _HEAD + f"{results['model']} in {results['engine']['dtype']} on {hardware['cores']} cores of "
        f"{hardware['cpu']}, {hardware['memory_gib']} GiB; {', '.join(made_with)}; "
        f"commit `{results['commit'][:12]}`, {results['date'][:10]}. The machine's load was "
        f"{results['load_average']:.1f} before it began, and {results['load_average_after']:.1f} at its end.",
        "",
        _workload("Throughput", results["workloads"]["throughput"]) + " Tokens per second:",
        "",
        *_table(results["tokens_per_second"], ("p50", "min", "max"), "{:.0f}"),
        "",
        "What is computed for each of these tokens beside the engine: in front of it, and by the client. Microseconds:",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {us:.0f} |" for name, us in results["cpu_us_per_token"].items()),
        "",
        _workload("Latency", results["workloads"]["latency"]) + " Milliseconds:",
        "",
        *_table(results["latency_ms"], ("p50", "p95"), "{:.1f}"),
        "",
        "New weights, from the trainer's call to the commit. Milliseconds:",
        "",
        *_table({name: f["ms"] for name, f in results["sync"].items()}, ("p50", "p95"), "{:.1f}"),
        "",
        "Bytes moved by an update: "
        + "; ".join(f"{name}: {f['bytes']:,}" for name, f in results["sync"].items() if "bytes" in f)
        + ".",
        "",
        "| ratio | |",
        "|---|---|",
        *(f"| {name} | {ratio:.3g} |" for name, ratio in results["ratios"].items()),
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _workload(name: str, work: dict[str, int]) -> str:
    return (
        f"{name}: {work['n_prompts']} prompts of {work['prompt_tokens']} tokens, {work['new_tokens']} tokens "
        "sampled for each, with logprobs."
    )


def _table(rows: dict[str, dict[str, float]], columns: tuple[str, ...], form: str) -> list[str]:
    head = "| |" + "".join(f" {column} |" for column in columns)
    body = [f"| {name} |" + "".join(f" {form.format(f[c])} |" for c in columns) for name, f in rows.items()]
    return [head, "|---|" + "---|" * len(columns), *body]
