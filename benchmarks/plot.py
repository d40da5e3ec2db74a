"""Time of attention against the side of the image grid, as a PNG, from a pytest-benchmark JSON file.

    pytest benchmarks/bench_attention.py --benchmark-only --benchmark-json=run.json
    python benchmarks/plot.py run.json

One panel for row, column and conv each, both axes logarithmic, a line an op; dense causal attention is the same line in
all three. The rows plotted are those of attention-forward whose sizes, the grid aside, occur with most grids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parents[1] / "docs" / "attention_time.png"
PATTERNS = ("row", "column", "conv")
SIZES = ("batch", "heads", "head_dim", "text_len", "dtype", "threads")
STYLES = {  # ops in the order of the legend
    "attention": {"color": "#c0392b", "linewidth": 2.4, "marker": "o"},
    "sdpa_causal": {"color": "#7f8c8d", "linestyle": "--", "marker": "s"},
    "flash_attn": {"color": "#2c3e50", "linestyle": "--", "marker": "D"},
    "sdpa_mask": {"color": "#e67e22", "marker": "^"},
    "flex": {"color": "#2980b9", "marker": "v"},
    "flex_permuted": {"color": "#16a085", "marker": "P"},
}
LABELS = {
    "attention": "dalle_fast.attention",
    "sdpa_causal": "SDPA, dense causal",
    "flash_attn": "flash-attn, dense causal",
    "sdpa_mask": "SDPA, dense mask",
    "flex": "FlexAttention, compiled",
    "flex_permuted": "FlexAttention, column-major",
}

Lines = dict[str, dict[str, dict[int, float]]]  # pattern -> op -> grid side -> milliseconds


def read_lines(run: dict[str, Any]) -> tuple[Lines, dict[str, Any]]:
    """What to draw, and the sizes it was measured at.

    Raises:
        ValueError: no op was timed at two grids.
    """
    rows = [row for row in run["benchmarks"] if row["group"] == "attention-forward"]
    grids: dict[tuple[Any, ...], set[int]] = {}
    for row in rows:
        grids.setdefault(_sizes(row), set()).add(row["extra_info"]["grid"])
    if max(map(len, grids.values()), default=0) < 2:
        raise ValueError("the file must have attention-forward rows of one size at two grids or more, but has none")
    wanted = max(grids, key=lambda sizes: len(grids[sizes]))
    lines: Lines = {pattern: {} for pattern in PATTERNS}
    for row in rows:
        info = row["extra_info"]
        if _sizes(row) != wanted or info["op"] not in STYLES:
            continue
        dense = info["pattern"] == "full"
        if dense and info["op"] == "attention":
            continue
        for pattern in PATTERNS if dense else (info["pattern"],):
            lines[pattern].setdefault(info["op"], {})[info["grid"]] = 1000 * row["stats"]["median"]
    return lines, dict(zip(SIZES, wanted, strict=True))


def _sizes(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["extra_info"][name] for name in SIZES)


def draw(run: dict[str, Any]) -> Figure:
    """The parsed JSON file as a figure."""
    lines, sizes = read_lines(run)
    machine = run["machine_info"]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PATTERNS), sharex=True, sharey=True)
    for panel, pattern in zip(panels, PATTERNS, strict=True):
        sides = sorted({side for times in lines[pattern].values() for side in times})
        for op, style in STYLES.items():
            times = lines[pattern].get(op)
            if times:
                panel.plot(sorted(times), [times[side] for side in sorted(times)], label=LABELS[op], **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sides, [str(side) for side in sides])
        panel.set_title(pattern)
        panel.set_xlabel("side of the image grid")
        panel.grid(which="both", alpha=0.25)
    panels[0].set_ylabel("forward, ms")
    handles = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    where = machine["cuda"] or f"{machine['cpu']['brand_raw']}, threads: {sizes['threads']}"
    figure.suptitle(
        f"Attention forward, B {sizes['batch']}, H {sizes['heads']}, D {sizes['head_dim']}, {sizes['text_len']} text "
        f"positions, {sizes['dtype']} ({where}, torch {machine['torch']})",
        fontsize=11,
    )
    return figure


def main() -> None:
    """Draw the file named on the command line."""
    parser = argparse.ArgumentParser(description="Time of attention against the image grid, as a PNG.")
    parser.add_argument("run", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("-o", "--out", type=Path, default=OUT, help="default: %(default)s")
    arguments = parser.parse_args()
    draw(json.loads(arguments.run.read_text(encoding="utf-8"))).savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
