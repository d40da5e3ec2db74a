"""Attention within each pattern against PyTorch's and other packages' attention, forward and backward.

Groups: attention-forward, attention-backward, attention-training (forward and backward in one call); attention-threads,
one thread against all; attention-module, layers with their projections. On a CPU shapes and rounds are chosen so that
the whole file takes minutes; where a GPU is, its shapes take their place. ``rivals.py`` lists the ops, ``oracle.py``
says when a result counts as right, ``measure.py`` how time, memory and the machine's ceilings are measured.

Each row's extra info holds its sizes and

- ``tflop_per_s``: of useful work, two products over the pattern's visible pairs, 2.5 times as much backward;
- ``roofline``: the time this work takes at the rate of a large matrix product over the measured time; on a GPU the
  larger of that and the least traffic at the rate of a copy;
- ``peak_bytes``: memory beyond the inputs, masks among them, the result included;
- ``mask_ceiling``: dense causal pairs over visible pairs, by how much the pattern can at best beat dense attention;
- ``error``: largest error against float64, over the largest value;
- ``slower``: by op, how many times as long the others of the same case take (``conftest.py``).

    pytest benchmarks/bench_attention.py --benchmark-only --benchmark-json=run.json
    python benchmarks/report.py run.json
    python benchmarks/plot.py run.json

The rows of one head (on a GPU, one batch) and 8 x 8 to 128 x 128 grids are those of the plot.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import oracle
import peers
import pytest
import rivals
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

ON_GPU = measure.DEVICE == "cuda"

SECONDS_A_ROW = 0.4
MOST_ROUNDS = 100
FEWEST_ROUNDS = [(0.1, 15), (0.5, 5), (float("inf"), 3)]  # up to so many seconds a call, at least so many rounds

pytestmark = pytest.mark.benchmark(timer=measure.clock)


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem. ``key`` names it in test ids, ``title`` in tables."""

    key: str
    title: str
    batch: int
    heads: int
    head_dim: int
    text_len: int
    grid: int
    dtype: torch.dtype


def dalle(batch: int, heads: int, grid: int, dtype: torch.dtype, key: str) -> Shape:
    """The paper's text length and head size."""
    kind = str(dtype).removeprefix("torch.")
    return Shape(key, f"{grid} x {grid}, B {batch}, H {heads}, D 64, {kind}", batch, heads, 64, 256, grid, dtype)


GRIDS = (8, 16, 32, 64, 128)
if ON_GPU:
    HALF = torch.bfloat16
    DALLE = [dalle(8, 62, 32, HALF, "dalle")]
    SMALL = [Shape("small", "8 x 8, B 4, H 4, D 32, bfloat16", 4, 4, 32, 32, 8, HALF)]
    LARGE = [dalle(8, 62, 64, HALF, "large")]
    SWEEP = [dalle(1, 62, grid, HALF, f"grid{grid}") for grid in GRIDS]
else:
    DALLE = [dalle(1, 16, 32, torch.float32, "dalle-float32"), dalle(1, 16, 32, torch.bfloat16, "dalle-bfloat16")]
    SMALL = [Shape("small", "8 x 8, B 4, H 4, D 32, float32", 4, 4, 32, 32, 8, torch.float32)]
    LARGE = [dalle(1, 4, 64, torch.float32, "large")]
    SWEEP = [dalle(1, 1, grid, torch.float32, f"grid{grid}") for grid in GRIDS]

PERMUTED_FROM_GRID = 32  # below, a block of FlexAttention's holds whole columns either way


def patterns(shape: Shape) -> list[Pattern]:
    """The paper's, after dense causal attention."""
    return [kind(shape.text_len, shape.grid) for kind in (Full, Row, Column, Conv)]


def make_case(shape: Shape, pattern: Pattern, mode: oracle.Mode) -> oracle.Case:
    """The shape's attention within a pattern."""
    sizes = (shape.batch, shape.heads, shape.head_dim, shape.dtype, measure.DEVICE)
    return oracle.Case(shape.title, pattern, *sizes, mode)


def rows(shapes: list[Shape], *modes: oracle.Mode) -> list[Any]:
    """One pytest parameter for each shape, pattern, mode and op."""
    return [
        pytest.param(make_case(shape, pattern, mode), op, id=f"{shape.key}-{pattern.name}-{mode}-{op}")
        for shape in shapes
        for pattern in patterns(shape)
        for mode in modes
        for op in ops(pattern, mode, shape)
    ]


def ops(pattern: Pattern, mode: oracle.Mode, shape: Shape) -> list[str]:
    """What is timed for a pattern, this library's ops first."""
    dense, in_plot = isinstance(pattern, Full), shape in SWEEP
    names = ["attention"]
    if mode != "backward" and not in_plot:
        names.append("attention_qkvpacked")
    if dense:
        names += ["sdpa_causal", "flash_attn"] if ON_GPU else ["sdpa_causal"]
    else:
        names.append("sdpa_mask")
    if (ON_GPU or mode == "forward") and not (dense and in_plot):
        names.append("flex")
    if "flex" in names and isinstance(pattern, Column) and pattern.width >= PERMUTED_FROM_GRID:
        names.append("flex_permuted")
    return names


def time_call(benchmark: BenchmarkFixture, call: Callable[[], Any]) -> float | None:
    """Time ``call``, which has run before, for a while; the median in seconds, None with --benchmark-disable."""
    if benchmark.disabled:
        benchmark.pedantic(call)
        return None
    once = measure.seconds_of(call)
    fewest = next(rounds for seconds, rounds in FEWEST_ROUNDS if once <= seconds)
    rounds = max(fewest, min(MOST_ROUNDS, int(SECONDS_A_ROW / once)))
    try:
        benchmark.pedantic(measure.timed(call), rounds=rounds)
    except KeyboardInterrupt:
        benchmark.has_error = True  # or pytest-benchmark fails over this row's lack of times, and writes no file
        raise
    return benchmark.stats.stats.median


def time_op(benchmark: BenchmarkFixture, group: str, case: oracle.Case, op: str) -> None:
    """Check an op on a case, time it, and record what the module's docstring says."""
    benchmark.group = group
    if op == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    call = rivals.make_call(op, case)
    error = oracle.worst_error(rivals.read_result(op, case, call()), *oracle.truth_and_peers(case))
    median = time_call(benchmark, call)
    if median is None:
        return
    if ON_GPU:
        peak_bytes = measure.device_peak_bytes(call)
    elif rivals.OPS[op].compiles:
        peak_bytes = measure.host_peak_bytes(call)
    else:
        peak_bytes = measure.fresh_host_peak_bytes(rivals.make_call, op, case, case.small())
    record(benchmark, case, median, error, peak_bytes, op=op, shape=case.shape, io_bytes=case.io_bytes)
    benchmark.extra_info["mask_ceiling"] = case.mask_ceiling


def record(
    benchmark: BenchmarkFixture,
    case: oracle.Case | peers.LayerCase,
    median: float,
    error: float,
    peak_bytes: int | None,
    *,
    op: str,
    shape: str,
    io_bytes: int = 0,
) -> None:
    """Put a row's numbers into its extra info; ``io_bytes`` is the least traffic, where it is known."""
    threads = torch.get_num_threads()
    least_seconds = case.flops / measure.matmul_flops_per_s(case.dtype, threads)
    if ON_GPU:
        least_seconds = max(least_seconds, io_bytes / measure.copy_bytes_per_s())
    benchmark.extra_info |= {
        "shape": shape,
        "pattern": case.pattern.name,
        "op": op,
        "mode": case.mode,
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "text_len": case.pattern.text_len,
        "grid": case.pattern.width,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device,
        "threads": threads,
        "tflop_per_s": case.flops / median / 1e12,
        "roofline": least_seconds / median,
        "peak_bytes": peak_bytes,
        "error": error,
    }


def autotuned_rows(mode: oracle.Mode) -> list[Any]:
    """One pytest parameter for each sparse pattern, where there is something to tune."""
    shape = DALLE[0]
    return [
        pytest.param(make_case(shape, pattern, mode), op, id=f"{shape.key}-{pattern.name}-{mode}-{op}")
        for pattern in patterns(shape)[1:]
        for op in (["flex_autotuned"] if ON_GPU else [])
    ]


# What matters most comes first, since a time limit cuts the end off.
ROWS = rows(DALLE, "forward") + rows(DALLE, "training", "backward") + autotuned_rows("forward")
ROWS += rows(SWEEP, "forward") + rows(LARGE, "forward") + rows(LARGE, "training", *(["backward"] if ON_GPU else []))
ROWS += rows(SMALL, "forward") + rows(SMALL, "training", "backward") + autotuned_rows("training")


@pytest.mark.parametrize("case, op", ROWS)
def test_attention(benchmark, case, op):
    time_op(benchmark, f"attention-{case.mode}", case, op)


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads}-threads")
def threads(request):
    """That number of threads for the test."""
    before = torch.get_num_threads()
    if request.param > before:
        pytest.skip(f"torch runs on {before} thread")
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(ON_GPU, reason="about CPU threads")
@pytest.mark.parametrize("shape", DALLE, ids=lambda shape: shape.key)
def test_threads(benchmark, shape, threads):
    case = make_case(shape, Row(shape.text_len, shape.grid), "forward")
    time_op(benchmark, "attention-threads", case, "attention")
    if benchmark.extra_info:
        benchmark.extra_info["op"] = f"attention, threads: {threads}"


LAYER_SIZES = {"batch": 8 if ON_GPU else 1, "heads": 8, "head_dim": 64, "text_len": 256, "grid": 32}
LAYER_DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LAYER_CASES = [
    peers.LayerCase(package, kind, mode, **LAYER_SIZES, dtype=LAYER_DTYPE, device=measure.DEVICE)
    for package in peers.DISTRIBUTIONS
    for mode in ("forward", "training")
    for kind in peers.patterns_of(package, LAYER_SIZES["text_len"], LAYER_SIZES["grid"])
]
LAYER_ROWS = [
    pytest.param(case, name, id=f"{case.package}-{case.mode}-{case.kind}-{'attention' if ours else 'peer'}")
    for case in LAYER_CASES
    for ours, name in ((True, "attention"), (False, case.package))
]


@pytest.mark.parametrize("case, name", LAYER_ROWS)
def test_module(benchmark, case, name):
    benchmark.group = "attention-module"
    release = peers.version(case.package)
    if release is None:
        pytest.skip(f"{case.package} is not installed: {peers.INSTALL}")
    call = peers.make_layer_call(name, case)
    error = oracle.worst_error(peers.read_result(call()), *peers.truth_and_peers(case))
    median = time_call(benchmark, call)
    if median is None:
        return
    if ON_GPU:
        peak_bytes = measure.device_peak_bytes(call)
    else:
        peak_bytes = measure.fresh_host_peak_bytes(peers.make_layer_call, name, case, case.small())
    shape = f"{peers.DISTRIBUTIONS[case.package]} {release}, {case.mode}"
    record(benchmark, case, median, error, peak_bytes, op=name, shape=shape)
