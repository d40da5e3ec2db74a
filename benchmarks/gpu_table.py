"""What ``make gpu`` measured as the README's table, and two runs of it against each other.

    python benchmarks/gpu_table.py                          prints the table of all benchmarks/results/*.json
    python benchmarks/gpu_table.py --readme README.md       puts it between the file's marks
    python benchmarks/gpu_table.py --compare ONE TWO        ratios that differ by more than 5%; exit status 1 if any do

A row of the table is one of this library's ops at the largest batch of its group, with the time of each rival over its
own (below 1: it loses); or a row of a group without rivals by case, with the shares of the machine's rates that it
recorded. The ratios that are compared are those two, and of groups without cases each row's time over the first row's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from report import milliseconds, short, table_line

RESULTS = Path(__file__).parent / "results"
START, END = "<!-- GPU: made by benchmarks/gpu_table.py -->", "<!-- end of GPU -->"
NOT_MEASURED = """\
The Triton kernels for GPUs have not been measured on one, so nothing is said about their speed;
[docs/attention.md](docs/attention.md) and [docs/gumbel.md](docs/gumbel.md) say what is known of them. `make gpu`
measures them, on a machine that has one."""

OWN = ("attention", "attention_qkvpacked", "attention_with_kvcache")
SHARES = ("matrix_share", "copy_share", "share_of_copy", "bandwidth_share", "roofline")
RATES = ("tokens_per_s", "images_per_s")
TIMES = ("fused_over_own", "time_over_plain")
CLOSE = 0.05

Rows = list[dict[str, Any]]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What ``make gpu`` wrote there, parts of one GPU one after the other."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def rows_of(run: dict[str, Any]) -> Rows:
    """The benchmarks of a run; none where it had none."""
    return run["benchmarks"].get("benchmarks", [])


def table(runs: list[dict[str, Any]]) -> str:
    """The README's text on GPUs, from what :func:`read_runs` gives."""
    measured = [run for run in runs if rows_of(run)]
    if not measured:
        return NOT_MEASURED
    lines: list[str] = []
    for name in dict.fromkeys(run["machine"]["gpu"] for run in measured):
        mine = [run for run in measured if run["machine"]["gpu"] == name]
        versions = {key: mine[0]["machine"].get(key) for key in ("driver", "torch", "triton", "commit")}
        lines += ["", f"On one {name} ({', '.join(f'{key} {value}' for key, value in versions.items() if value)}):", ""]
        lines += [table_line(["", "median", "rivals' times over it, or its share"]), table_line(["---", "--:", "---"])]
        for run in mine:
            lines += _table_rows(rows_of(run))
    return "\n".join(lines[1:])


def _table_rows(rows: Rows) -> list[str]:
    lines = []
    largest: dict[str, int] = {}
    for row in rows:
        largest[row["group"]] = max(largest.get(row["group"], 0), row["extra_info"].get("batch", 0))
    for row in rows:
        info = row["extra_info"]
        if "slower" in info:
            if info["op"] not in OWN or info["batch"] < largest[row["group"]] or not info["slower"]:
                continue
            case = f"`{info['op']}`, {info['pattern']}, {row['group']}, {info['shape']}"
            said = [f"{rival} {ratio:.2f}x" for rival, ratio in info["slower"].items()]
        else:
            case = f"{row['group']}: {row['name'].removeprefix('test_')}"
            said = [f"{key} {100 * info[key]:.0f}%" for key in SHARES if info.get(key) is not None]
            said += [f"{short(info[key])} {key.replace('_per_s', '/s')}" for key in RATES if key in info]
            said += [f"{key} {info[key]:.2f}" for key in TIMES if key in info]
        lines.append(table_line([case, f"{milliseconds(row['stats']['median'])} ms", ", ".join(said)]))
    return lines


def put_into(text: str, block: str) -> str:
    """A file's text with ``block`` between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"the file must hold the lines {START} and {END} once each")
    before, rest = text.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"


def ratios(rows: Rows) -> dict[str, float]:
    """All that a second run has to repeat, by name."""
    found: dict[str, float] = {}
    first: dict[str, float] = {}
    for row in rows:
        info, median = row["extra_info"], row["stats"]["median"]
        name = row.get("fullname", row["name"])
        if "slower" in info:
            found |= {f"{name}: {rival} / {info['op']}": ratio for rival, ratio in info["slower"].items()}
            continue
        found[f"{name}: time / the group's first"] = median / first.setdefault(row["group"], median)
        found |= {f"{name}: {key}": info[key] for key in (*SHARES, *TIMES) if info.get(key) is not None}
    return found


def compare(one: Rows, two: Rows) -> list[str]:
    """A line for each ratio that differs by more than CLOSE, or that one of the runs lacks."""
    old, new = ratios(one), ratios(two)
    lines = [
        f"only in the {which} run: {name}"
        for which, a, b in (("first", old, new), ("second", new, old))
        for name in a
        if name not in b
    ]
    for name in old.keys() & new.keys():
        off = new[name] / old[name] - 1
        if abs(off) > CLOSE:
            lines.append(f"{name}: {old[name]:.3g}, then {new[name]:.3g} ({off:+.0%})")
    return sorted(lines)


def main() -> int:
    """What the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description="Tables of what make gpu measured.")
    parser.add_argument("--readme", type=Path, help="file to put the table into")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("ONE", "TWO"), help="two runs' JSON files")
    arguments = parser.parse_args()
    if arguments.compare:
        one, two = (rows_of(json.loads(path.read_text("utf-8"))) for path in arguments.compare)
        different = compare(one, two)
        print("\n".join(different) or f"{len(ratios(one))} ratios, all within {CLOSE:.0%}")
        return 1 if different else 0
    block = table(read_runs(RESULTS))
    if arguments.readme:
        text = arguments.readme.read_text("utf-8")
        arguments.readme.write_text(put_into(text, block), "utf-8")
    else:
        print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
