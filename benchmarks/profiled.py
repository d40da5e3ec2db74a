"""One call of every kernel, for a profiler to watch: ``python benchmarks/gpu.py --profiled``.

On a GPU they have their benchmarks' sizes. Each runs once before the profiler is let in, so that compiling and first
launches are left out. With Nsight Compute: ``ncu --profile-from-start off --nvtx ...``; a range names the call that a
kernel belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bench_attention
import bench_cross_entropy
import bench_gumbel
import bench_kv_cache
import rivals
import torch


def calls() -> dict[str, Callable[[], Any]]:
    """By name, those of attention forward and backward, decoding, the quantiser and the classifier's loss."""
    small = not torch.cuda.is_available()
    shape, found = bench_attention.SMALL[0] if small else bench_attention.DALLE[-1], {}
    for pattern in bench_attention.patterns(shape)[1:]:
        case = bench_attention.make_case(shape, pattern, "training")
        found[f"attention {pattern.name}"] = rivals.make_call("attention", case)
    batch = bench_kv_cache.BATCHES[0 if small else 1]
    for pattern in bench_kv_cache.PATTERNS:
        tensors = bench_kv_cache.sequences(batch)
        found[f"decode {pattern.name}"] = _repeatable(bench_kv_cache.Cached(batch, 512, pattern, tensors))
    sizes = bench_gumbel.SMALL if small else bench_gumbel.LARGE
    found["gumbel_quantize"] = bench_gumbel.make_call("gumbel_quantize", sizes._replace(forward=False))
    case = bench_cross_entropy.CASES["small" if small else "8192"]
    found["linear_cross_entropy"] = bench_cross_entropy.make_call("linear_cross_entropy", case)
    return found


def _repeatable(step: bench_kv_cache.Cached) -> Callable[[], Any]:
    def call() -> Any:
        step.rewind()
        return step()

    return call


@contextmanager
def _watched(name: str) -> Iterator[None]:
    """Lets a profiler in that waits for it, and names what it sees; nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with torch.cuda.nvtx.range(name):
        yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def run_profiled() -> None:
    """All of them, twice: the profiler sees the second time."""
    for name, call in calls().items():
        call()
        with _watched(name):
            call()
        print(name, flush=True)
