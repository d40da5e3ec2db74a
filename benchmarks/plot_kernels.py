"""What a training update spends its time in, kernel by kernel, as a PNG, from a pytest-benchmark JSON file.

    pytest benchmarks/bench_model.py --benchmark-only --benchmark-json=run.json
    python benchmarks/plot_kernels.py run.json --out kernels.png

A panel for each row that recorded its ``kernels``, longest first; the bars' lengths are shares of all kernels' time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAME_LENGTH = 60


def draw(run: dict[str, Any]) -> Figure:
    """The JSON file's content as a figure.

    Raises:
        ValueError: no row recorded its kernels.
    """
    rows = [row for row in run["benchmarks"] if row["extra_info"].get("kernels")]
    if not rows:
        raise ValueError("the file must hold a row with its kernels, got none")
    figure = Figure(figsize=(11, 3.6 * len(rows)), layout="constrained")
    for panel, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        shares = row["extra_info"]["kernels"]
        names = [name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in shares]
        panel.barh(range(len(names)), [100 * share for share in shares.values()], color="#2980b9")
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel("% of all kernels' time")
        panel.set_title(f"{row['name'].removeprefix('test_')}, {1000 * row['stats']['median']:.1f} ms", fontsize=10)
    return figure


def main() -> None:
    """Draw the file named on the command line."""
    parser = argparse.ArgumentParser(description="Kernels of a training update, as a PNG.")
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    draw(json.loads(arguments.run.read_text(encoding="utf-8"))).savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
