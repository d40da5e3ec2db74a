"""Times tiles of the attention kernels against those of their tables, on a GPU.

    python benchmarks/tune_tiles.py [--head-dim 64] [--batch 8] [--heads 62] [--grid 32] [--out tiles.json]

For row, column and convolutional attention in bfloat16, and each of the forward pass, dq and dk/dv by itself: the
table's tiles and variations of them, which are compiled on all cores first. What a variation computes must be what the
table's tiles do, but for rounding. One table a kernel and pattern is printed, the fastest first; times are relative to
the table's. A winner goes into the kernel's table by hand, with the GPU it was measured on, once a second run agrees.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

from dalle_fast.patterns import Column, Conv, Pattern, Row

ROUNDS = 20
TOLERANCE = 0.02  # of the largest value, in bfloat16
KERNELS = ("forward", "dq", "dkdv")


class Sizes(NamedTuple):
    """Of the attention that is timed."""

    batch: int
    heads: int
    head_dim: int
    text_len: int
    grid: int
    dtype: torch.dtype = torch.bfloat16

    def patterns(self) -> list[Pattern]:
        """Those that are timed."""
        return [kind(self.text_len, self.grid) for kind in (Row, Column, Conv)]


def variations(tiles: Any) -> Iterator[Any]:
    """The tiles themselves, then others that a multiprocessor may like better."""
    yield tiles
    seen = {tiles}
    for block in (tiles.block, 64, 128):
        for step in (tiles.step, 32, 64, 128):
            for window_step in (tiles.window_step, 16, 32, 64):
                for num_warps in (4, 8):
                    for num_stages in (1, 2, 3):
                        other = type(tiles)(block, step, window_step, num_warps, num_stages)
                        # One thing at a time, and warps with it: all products would take an hour.
                        changed = sum(
                            a != b for a, b in zip(other[:3] + other[4:5], tiles[:3] + tiles[4:5], strict=True)
                        )
                        if changed <= 1 and other not in seen:
                            seen.add(other)
                            yield other
    for max_registers in (0, 128, 168):
        other = tiles._replace(max_registers=max_registers)
        if other not in seen:
            seen.add(other)
            yield other


class Bench:
    """One pattern's tensors, and the launches of each kernel with any tiles."""

    def __init__(self, sizes: Sizes, pattern: Pattern) -> None:
        from dalle_fast.kernels import attention_backward, attention_forward, common

        self.forward, self.backward, self.pattern = attention_forward, attention_backward, pattern
        generator = torch.Generator(measure.DEVICE).manual_seed(0)
        shape = (5, sizes.batch, sizes.heads, pattern.seq_len, sizes.head_dim)
        made = torch.randn(shape, generator=generator, device=measure.DEVICE).to(sizes.dtype)
        self.query, self.key, self.value, self.grad_out, self.out = made.unbind()
        self.lse = torch.empty(shape[1:4], device=measure.DEVICE)
        self.grads = [torch.empty_like(self.query) for _ in range(3)]
        self.device = common.device_of(self.query)
        self.options = {
            "pattern": pattern.code,
            "text_lens": None,
            "scale": sizes.head_dim**-0.5,
            "device": self.device,
        }
        tables = {"forward": attention_forward.TILES, "dq": attention_backward.DQ_TILES}
        tables["dkdv"] = attention_backward.DKDV_TILES
        self.tiles = {
            name: common.choose_tiles(table, self.device, sizes.dtype, sizes.head_dim) for name, table in tables.items()
        }
        for kernel in KERNELS:  # out and lse for the others, and what dk and dv read of dq's
            self.call(kernel, self.tiles[kernel])()

    def call(self, kernel: str, tiles: Any) -> Callable[[], None]:
        """A launch of the kernel, or of dk/dv and the sum of its shares."""
        qkv = (self.query, self.key, self.value, self.out, self.lse)
        if kernel == "forward":
            launches = [self.forward.plan_fwd(*qkv, **self.options, tiles=tiles)]
        else:
            chosen = {"dq_tiles" if kernel == "dq" else "dkdv_tiles": tiles}
            launches = self.backward.plan_bwd(*qkv, self.grad_out, None, *self.grads, **self.options, **chosen)
            if kernel == "dkdv":  # which reads the statistics that dq leaves, in memory of this plan
                launches[0].run(self.query.device)
            launches = launches[:1] if kernel == "dq" else launches[1:]

        def run() -> None:
            for launch in launches:
                launch.run(self.query.device)

        return run

    def results(self, kernel: str) -> list[Tensor]:
        """What the kernel writes."""
        return {"forward": [self.out], "dq": self.grads[:1], "dkdv": self.grads[1:]}[kernel]


def compile_one(sizes: Sizes, pattern: Pattern, kernel: str, tiles: Any) -> str | None:
    """Run it once, which leaves it in Triton's cache; why it cannot be, or None."""
    try:
        Bench(sizes, pattern).call(kernel, tiles)()
        if measure.DEVICE == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler says of tiles that nobody has tried, it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return None


def time_kernel(bench: Bench, kernel: str, candidates: list[Any]) -> list[tuple[Any, float]]:
    """Tiles and median seconds, the fastest first.

    Raises:
        AssertionError: tiles with another result than the table's.
    """
    bench.call(kernel, candidates[0])()
    expected = [result.float() for result in bench.results(kernel)]
    found = []
    for tiles in candidates:
        call = bench.call(kernel, tiles)
        for result in bench.results(kernel):
            result.fill_(torch.nan)
        call()
        for result, wanted in zip(bench.results(kernel), expected, strict=True):
            off = (result.float() - wanted).abs().max() / wanted.abs().max()
            assert off <= TOLERANCE, f"{kernel} of {bench.pattern} with {tiles} is off by {off:.1%}"
        found.append((tiles, statistics.median(measure.seconds_of(call) for _ in range(ROUNDS))))
    return sorted(found, key=lambda row: row[1])


def tune(sizes: Sizes, most: int | None = None, workers: int = os.cpu_count() or 1) -> list[dict[str, Any]]:
    """A row for each kernel, pattern and tiles: milliseconds, and these over the table's; or why there are none.

    Args:
        most: candidates of each kernel and pattern, the table's first; None is all.
        workers: processes that compile; 0 compiles here.
    """
    rows = []
    for pattern in sizes.patterns():
        bench = Bench(sizes, pattern)
        jobs = [(kernel, tiles) for kernel in KERNELS for tiles in list(variations(bench.tiles[kernel]))[:most]]
        if workers:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context) as pool:
                futures = [pool.submit(compile_one, sizes, pattern, *job) for job in jobs]
                faults = [future.result() for future in futures]
        else:
            faults = [compile_one(sizes, pattern, *job) for job in jobs]
        for kernel in KERNELS:
            works = [tiles for (name, tiles), fault in zip(jobs, faults, strict=True) if name == kernel and not fault]
            base = {"kernel": kernel, "pattern": pattern.name}
            times = time_kernel(bench, kernel, works)
            own = dict(times)[bench.tiles[kernel]]
            rows += [
                base | {"tiles": tiles._asdict(), "ms": 1000 * seconds, "over_table": seconds / own}
                for tiles, seconds in times
            ]
            rows += [
                base | {"tiles": tiles._asdict(), "fault": fault}
                for (name, tiles), fault in zip(jobs, faults, strict=True)
                if name == kernel and fault
            ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As text: the table's tiles have 1.00."""
    lines, last = [], None
    for row in rows:
        if (row["kernel"], row["pattern"]) != last:
            last = row["kernel"], row["pattern"]
            lines += ["", f"{last[0]}, {last[1]}"]
        tiles = " ".join(f"{value:4}" for value in row["tiles"].values())
        lines.append(
            f"  {tiles}  {row['ms']:8.4f} ms  {row['over_table']:.2f}" if "ms" in row else f"  {tiles}  {row['fault']}"
        )
    return "\n".join(lines[1:])


def main() -> int:
    """Tune, print, write."""
    parser = argparse.ArgumentParser(description="Time tiles of the attention kernels.")
    for name, default in (("batch", 8), ("heads", 62), ("head-dim", 64), ("text-len", 256), ("grid", 32)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--most", type=int, help="candidates of a kernel and pattern (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    arguments = parser.parse_args()
    if measure.DEVICE != "cuda":
        parser.exit(1, "tuning needs a GPU\n")
    sizes = Sizes(arguments.batch, arguments.heads, arguments.head_dim, arguments.text_len, arguments.grid)
    rows = tune(sizes, arguments.most)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{torch.cuda.get_device_name()}, {sizes}: block, step, window_step, num_warps, num_stages, max_registers")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
