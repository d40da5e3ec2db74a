"""A pytest-benchmark JSON file as Markdown.

    pytest benchmarks --benchmark-only --benchmark-json=run.json
    python benchmarks/report.py run.json

One table a group, in the order in which the benchmarks ran: median time with the 20th and 80th percentile, speed
against the group's first row (below 1 is slower), and the rates that the benchmark recorded.

Where rows name their op, one table a shape: what of these was recorded, useful work per second, its share of the
roofline, memory beyond the inputs, a cache's, by how much the pattern can at best beat dense attention (ceiling), the
error against float64; and the times of the other ops on the same case over the row's (below 1: the row loses; dense
causal attention counts in every pattern).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any


def report(run: dict[str, Any]) -> str:
    """The parsed JSON file as Markdown.

    Raises:
        KeyError: it was not written by pytest-benchmark with these benchmarks' conftest.py.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        shape = benchmark["extra_info"].get("shape")
        title = benchmark["group"] if shape is None else f"{benchmark['group']}, {shape}"
        tables.setdefault(title, []).append(benchmark)
    lines = _heading(run)
    for title, rows in tables.items():
        lines += _op_table(title, rows) if "op" in rows[0]["extra_info"] else _table(title, rows)
    return "\n".join(lines)


def _heading(run: dict[str, Any]) -> list[str]:
    machine, commit = run["machine_info"], run["commit_info"]
    state = " with uncommitted changes" if commit["dirty"] else ""
    extension = machine["cpp"]
    native = f"C++ level {extension['cpu_level']}" if extension else "no C++ extension"
    gpu = machine["cuda"] or "none"
    if machine["cuda"]:
        gpu += f" (driver {machine['driver'] or 'unknown'}, CUDA {machine['cuda_runtime']}, triton {machine['triton']})"
    return [
        f"- {machine['cpu']['brand_raw']}, threads: {machine['threads']}, GPU: {gpu}, "
        f"PyTorch on {machine['torch_cpu_capability']}, {native}",
        f"- {machine['system']} {machine['machine']}, Python {machine['python_version']}, torch {machine['torch']}, "
        f"dalle_fast {machine['dalle_fast']}, commit {str(commit['id'])[:12]}{state}, {run['datetime'][:10]}",
    ]


def _table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    rates = list(dict.fromkeys(rate for row in rows for rate in row["extra_info"] if rate != "kernels"))
    titles = ["benchmark", "median", "p20 to p80", "rounds", "speed", *(rate.replace("_per_s", "/s") for rate in rates)]
    lines = ["", f"### {name}", "", table_line(titles), table_line(["---"] + ["--:"] * (len(titles) - 1))]
    first = rows[0]["stats"]["median"]
    for row in rows:
        stats = row["stats"]
        low, high = _percentiles(stats["data"])
        cells = [
            row["name"].removeprefix("test_"),
            f"{milliseconds(stats['median'])} ms",
            f"{milliseconds(low)} to {milliseconds(high)}",
            str(stats["rounds"]),
            f"{first / stats['median']:.2f}",
            *(short(row["extra_info"][rate]) if rate in row["extra_info"] else "" for rate in rates),
        ]
        lines.append(table_line(cells))
    for row in rows:
        if "kernels" in row["extra_info"]:
            shares = row["extra_info"]["kernels"].items()
            said = ", ".join(f"`{kernel}` {100 * share:.1f}%" for kernel, share in shares)
            lines += ["", f"Kernels of {row['name'].removeprefix('test_')}: {said}"]
    return lines


_OP_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # extra info: title, text
    "tflop_per_s": ("TFLOP/s", lambda rate: short(rate)),
    "roofline": ("roofline", lambda share: f"{100 * share:.0f}%"),
    "peak_bytes": ("memory", lambda size: f"{short(size / 2**20)} MiB"),
    "cache_bytes": ("cache", lambda size: f"{short(size / 2**20)} MiB"),
    "mask_ceiling": ("ceiling", lambda ratio: f"{ratio:.2f}"),
    "error": ("error", lambda error: f"{error:.1e}"),
}


def _op_table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    rivals = list(dict.fromkeys(row["extra_info"]["op"] for row in rows))
    rivals = [op for op in rivals if any(op in row["extra_info"]["slower"] for row in rows)]
    columns = {key: column for key, column in _OP_COLUMNS.items() if any(key in row["extra_info"] for row in rows)}
    titles = ["pattern", "op", "median", "p20 to p80", "rounds", *(name for name, _ in columns.values())]
    titles += [f"{op} / op" for op in rivals]
    lines = ["", f"### {title}", "", table_line(titles), table_line(["---"] * 2 + ["--:"] * (len(titles) - 2))]
    for row in rows:
        stats, info = row["stats"], row["extra_info"]
        low, high = _percentiles(stats["data"])
        cells = [
            info["pattern"],
            info["op"],
            f"{milliseconds(stats['median'])} ms",
            f"{milliseconds(low)} to {milliseconds(high)}",
            str(stats["rounds"]),
            *("" if info.get(key) is None else text(info[key]) for key, (_, text) in columns.items()),
            *(f"{info['slower'][op]:.2f}" if op in info["slower"] else "" for op in rivals),
        ]
        lines.append(table_line(cells))
    return lines


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    """The 20th and the 80th."""
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0], fifths[-1]


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def milliseconds(seconds: float) -> str:
    return short(1000 * seconds)


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Print the report of the file named on the command line."""
    parser = argparse.ArgumentParser(description="A pytest-benchmark JSON file as Markdown.")
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    print(report(json.loads(parser.parse_args().run.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
